"""How the words of check, hint and solution look: HTML in a notebook, with the same words as plain text."""

import html

LOOK = {  # outcome: (sign, colour of the frame); the words say it too
    "passed": ("✓", "#009E73"),
    "not solved": ("○", "#0072B2"),
    "wrong": ("✗", "#D55E00"),
    "raised": ("✗", "#D55E00"),
    "stopped": ("✗", "#D55E00"),
    "unknown": ("?", "#0072B2"),
}


def show_block(outcome: str, title: str, body: str) -> None:
    sign, colour = LOOK[outcome]
    pre = (
        "<pre style='margin:2px 0 0;padding:0;background:none;color:inherit;white-space:pre-wrap;"
        "font-family:var(--jp-code-font-family,monospace)'>"
        f"{html.escape(body)}</pre>"
    )
    markup = (
        f"<div style='border:2px solid {colour};border-radius:4px;padding:2px 8px;margin:4px 0'>"
        f"<b>{sign} {html.escape(title)}</b>{pre if body else ''}</div>"
    )
    indented = "".join(f"\n  {line}" for line in body.split("\n")) if body else ""
    display_bundle({"text/html": markup, "text/plain": f"{sign} {title}{indented}"})


def show_markdown(text: str) -> None:
    display_bundle({"text/markdown": text, "text/plain": text.replace("**", "")})


def display_bundle(bundle: dict) -> None:
    if in_notebook():
        from IPython.display import display

        display(bundle, raw=True)
    else:
        print(bundle["text/plain"])


def in_notebook() -> bool:
    from IPython import get_ipython

    return get_ipython() is not None
