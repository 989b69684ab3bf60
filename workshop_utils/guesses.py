"""A reader's prediction, kept and shown beside the measurement (every notebook, from 00 on)."""

from workshop_utils import progress_file
from workshop_utils.plotting import INK, MUTED, PAPER
from workshop_utils.showing import in_notebook


def guess(question: str, value) -> None:
    """Keep the reader's prediction. `value` None means "no guess yet"."""
    if value is None:
        print("No guess yet. Put your guess in place of None and run this cell again.")
        return
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, (bool, int, float, str)):
        value = str(value)

    def change(data):
        data["guesses"][question] = {"value": value, "at": progress_file.now()}

    progress_file.update(change)
    print(f"Your guess is kept: {_figure(value)}")


def compare_guess(question: str, measured, unit: str = "") -> None:
    """Show the reader's guess beside what came out; numbers are drawn as two bars."""
    kept = progress_file.read()["guesses"].get(question, {}).get("value")
    measured = measured.item() if hasattr(measured, "item") else measured
    text = f"measured: {_figure(measured)} {unit}".rstrip()
    if kept is None:
        print(f"{text} (you made no guess)")
        return
    print(f"your guess: {_figure(kept)} {unit}".rstrip() + f"\n{text}")
    if _is_number(kept) and _is_number(measured):
        _draw_guess(question, kept, measured, unit)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _figure(value) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if _is_number(value) else str(value)


def _draw_guess(question: str, guessed: float, measured: float, unit: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 1.3), layout="constrained")
    plot_guess(axes, guessed, measured, unit)
    axes.set_title(question, fontsize="medium", loc="left")
    if in_notebook():
        plt.show()
    plt.close(figure)


def plot_guess(axes, guessed: float, measured: float, unit: str = "") -> None:
    """Two bars: the guess (hatched) and the measurement; a log scale where they differ by more than 30 times."""
    bars = axes.barh(["measured", "your guess"], [measured, guessed], color=[INK, PAPER])
    bars[1].set(hatch="///", edgecolor=MUTED)
    axes.bar_label(bars, [f" {_figure(measured)} {unit}", f" {_figure(guessed)} {unit}"])
    low, high = sorted((abs(guessed), abs(measured)))
    if low > 0 and high / low > 30 and min(guessed, measured) > 0:
        axes.set_xscale("log")
        axes.set_xlabel("log scale")
        axes.set_xlim(low / 3, high * 10)
    else:
        axes.margins(x=0.25)
