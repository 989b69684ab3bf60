"""Sharing an adapter on the Hugging Face Hub: a model card, and the upload. Notebook 05.

Everything goes through huggingface_hub, which finds the token by itself (`hf auth login`, or HF_TOKEN). No function
here takes a token, prints one, returns one or lets one into an error message.
"""

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from workshop_utils.peft_format import CONFIG_FILE, WEIGHTS_FILE, read_adapter

CARD_FILE = "README.md"
WHO_TIMEOUT_S = 5.0
_LOG_IN = "Run `hf auth login` in a terminal, or set HF_TOKEN, and try again."

_CARD = """\
---
{metadata}
---

# {title}

{description}

## Load it

```python
{code}
```

## What it is

LoRA with r = {r}, lora_alpha = {lora_alpha}, on {modules}: {parameters:,} parameters.

{results}## License

Not stated yet. Add `license: ...` to the block at the top of this file, and say here where the data came from.
"""


def write_model_card(
    folder: str | Path, *, base_model: str, description: str, metrics: Mapping[str, object]
) -> Path:
    """Write README.md beside a saved adapter: what it is, how to load it with peft, and a table of `metrics`.

    `base_model` is a repository id ("owner/name", which the Hub then links) or a few words. The license is the
    author's to choose: the card says that none is stated. Returns the card's path.
    Raises FileNotFoundError or ValueError where the folder holds no adapter.
    """
    folder = Path(folder)
    settings, tensors = read_adapter(folder)
    targets = settings["target_modules"]
    card = _CARD.format(
        metadata=ModelCardData(
            base_model=base_model if _is_repo_id(base_model) else None,
            library_name="peft",
            tags=["lora", "peft"],
        ).to_yaml(),
        title=folder.resolve().name,
        description=description.strip(),
        code=_loading_code(folder, base_model),
        r=settings["r"],
        lora_alpha=settings["lora_alpha"],
        modules=f"`{targets}`" if isinstance(targets, str) else ", ".join(f"`{name}`" for name in targets),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        results=_results_table(metrics),
    )
    ModelCard(card).save(folder / CARD_FILE)
    return folder / CARD_FILE


def push_adapter(folder: str | Path, repo_id: str, *, private: bool = True) -> str:
    """Upload the adapter in `folder` (configuration, weights and card, nothing else); returns the repository's URL.

    `repo_id` is "owner/name"; the repository is made if it is not there, private unless told otherwise. One commit
    holds all files, so a push that is cut off changes nothing, and can be repeated.
    Raises FileNotFoundError or ValueError for a folder without a whole adapter, ValueError for an impossible name or
    card, PermissionError where the Hub does not let you, ConnectionError where it does not answer. One line each.
    """
    folder = Path(folder)
    read_adapter(folder)
    try:
        # a wrong token and a missing network show here, before anything is made
        _within(WHO_TIMEOUT_S, _user_name)
        api = HfApi()
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, CARD_FILE],
            commit_message="Upload a LoRA adapter",
        )
        return str(repo)
    except Exception as error:  # noqa: BLE001  whatever the client raises is said in our words, without its details
        explained = _explained(error, repo_id)
    raise explained  # outside the handler: nothing of the client's own traceback comes along


def logged_in_as() -> str | None:
    """Your name on the Hub, or None: no token, a token that the Hub refuses, or no answer within 5 seconds."""
    try:
        return _within(WHO_TIMEOUT_S, _user_name)
    except Exception:  # noqa: BLE001  a question must not fail
        return None


def _user_name() -> str:
    if huggingface_hub.get_token() is None:
        raise PermissionError(f"you are not logged in to the Hugging Face Hub. {_LOG_IN}")
    return HfApi().whoami()["name"]


def _within(limit_s: float, function: Callable[[], str]) -> str:
    """The result of `function`, in a thread that is left behind where it takes longer: the client has no limit."""
    results, errors = [], []

    def run():
        try:
            results.append(function())
        except Exception as error:  # noqa: BLE001  raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0]
    if not results:
        raise ConnectionError(f"the Hugging Face Hub did not answer within {limit_s:g} seconds")
    return results[0]


def _explained(error: Exception, repo_id: str) -> Exception:
    """What went wrong and what to do next, in one line."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HTTPError):
        cause = cause.__cause__
    if isinstance(cause, HfHubHTTPError):
        return _refusal(cause, repo_id)
    if cause is not None:
        return ConnectionError(
            f"the Hugging Face Hub at {_endpoint()} cannot be reached, or the connection broke. A push is one commit, "
            "whole or not at all: push again when the network is back."
        )
    if isinstance(error, json.JSONDecodeError):
        return ConnectionError(
            f"what answers at {_endpoint()} is not the Hugging Face Hub: a proxy or a login page?"
        )
    if isinstance(error, UnicodeError):  # before ValueError, which it is
        return PermissionError(f"what is set as your token cannot be a token. {_LOG_IN}")
    if isinstance(error, HFValidationError):
        return ValueError(f"{repo_id!r} cannot be the name of a repository: {_one_line(error)}")
    for kind in (PermissionError, ConnectionError, ValueError):
        if isinstance(error, kind):
            return kind(_one_line(error))
    return RuntimeError(f"pushing to {repo_id} failed: {type(error).__name__}: {_one_line(error)}")


def _refusal(error: HfHubHTTPError, repo_id: str) -> Exception:
    status = error.response.status_code
    if status == 401:
        return PermissionError(f"the Hugging Face Hub does not accept your token. {_LOG_IN}")
    if status in (403, 404):
        return PermissionError(
            f"you may not write to {repo_id}: the name belongs to somebody else, or your token may only read. Use "
            f"your own name, and a token that may write (see {_endpoint()}/settings/tokens)."
        )
    if status >= 500 or status == 429:
        return ConnectionError(
            f"the Hugging Face Hub answered {status}, it is busy or broken. Push again later."
        )
    return ValueError(f"the Hugging Face Hub refuses the upload ({status}): {_one_line(error)}")


def _one_line(error: Exception) -> str:
    """The message on one line, with the token, should it stand there, taken out."""
    token = huggingface_hub.get_token()
    text = " ".join(str(error).split())
    return text.replace(token, "(token)") if token else text


def _endpoint() -> str:
    return huggingface_hub.constants.ENDPOINT


def _is_repo_id(base_model: str) -> bool:
    """The Hub refuses a card whose base_model is not the id of a repository."""
    try:
        huggingface_hub.utils.validate_repo_id(base_model)
    except HFValidationError:
        return False
    return "/" in base_model


def _loading_code(folder: Path, base_model: str) -> str:
    """Six lines that a reader can copy."""
    kind = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("auto_mapping") or {}
    name, library = kind.get("base_model_class", "BaseModel"), kind.get("parent_library", "__main__")
    if library.startswith("transformers."):
        first, make = f"from transformers import {name}", f'{name}.from_pretrained("{base_model}")'
    else:
        first = (
            f"# {name}: the class of the base" if library == "__main__" else f"from {library} import {name}"
        )
        make = f"{name}()  # and load the weights of the base into it: {' '.join(base_model.split())}"
    return "\n".join(
        (
            "from peft import PeftModel",
            first,
            "",
            f"base = {make}",
            'model = PeftModel.from_pretrained(base, "OWNER/NAME")  # the id at the top of this page, or a folder',
            "model.eval()",
        )
    )


def _results_table(metrics: Mapping[str, object]) -> str:
    if not metrics:
        return ""
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in metrics.items()]
    return "\n".join(["## Results", "", "| | |", "|---|---:|", *rows]) + "\n\n"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return " ".join(str(value).split()).replace("|", "\\|")
