"""SmolLM2 from the Hugging Face Hub, through huggingface_hub: a quick question first, then files that are checked."""

import shutil
from pathlib import Path

from workshop_utils.hub import _within
from workshop_utils.language_model import MODEL_NAME, REQUIRED_FILES, sha256_of

ANSWER_LIMIT_S = 6.0
FILES = (*REQUIRED_FILES, "generation_config.json", "chat_template.jinja", "special_tokens_map.json")


def from_hub(new: Path, partial: Path) -> str:
    """The model's files into the folder `new`; `partial` keeps what an interrupted download has brought so far.

    Returns where they came from, with the commit. Raises ConnectionError, in a few words, where the Hub does not
    answer within seconds, the connection breaks, or a file is not the one that the Hub announced.
    """
    import huggingface_hub
    from huggingface_hub import HfApi, snapshot_download

    try:
        # a look-up without DNS can hang beyond any time limit of the client
        info = _within(
            ANSWER_LIMIT_S,
            lambda: HfApi().model_info(MODEL_NAME, files_metadata=True, timeout=ANSWER_LIMIT_S, token=False),
        )
        wanted = {file.rfilename: file for file in info.siblings if file.rfilename in FILES}
        total_bytes = sum(file.size or 0 for file in wanted.values())
        print(f"fetch: {MODEL_NAME} from the Hub, {total_bytes:,} bytes", flush=True)
        snapshot_download(
            MODEL_NAME, revision=info.sha, local_dir=partial, allow_patterns=list(wanted), token=False
        )
    except Exception as error:  # noqa: BLE001  the client raises a dozen kinds; all mean the same here
        raise ConnectionError(
            f"no model from the Hugging Face Hub at {huggingface_hub.constants.ENDPOINT} ({_short(error)})"
        ) from None
    for name, file in wanted.items():
        path = partial / name
        if file.lfs and sha256_of(path) != file.lfs.sha256:
            path.unlink()
            raise ConnectionError(f"{name} from the Hub has another SHA-256 than announced, and was deleted")
        shutil.copyfile(path, new / name)
    return f"the Hub, {MODEL_NAME} at {info.sha[:12]}"


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."
