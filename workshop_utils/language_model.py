"""SmolLM2-135M-Instruct from the user's cache, where `python -m workshop_utils fetch` puts it. Notebooks 07 and 08.

The folder holds what transformers writes (bfloat16 weights in model.safetensors, configuration, tokenizer) and
manifest.json with the bytes and the SHA-256 of each file. fetch.py fills it; nothing here asks a network.

Allal et al. 2025, "SmolLM2: When Smol Goes Big" (arXiv:2502.02737). 134,515,008 parameters, 30 layers of width 576.
"""

import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from workshop_utils.data import cache_folder

MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
NUM_PARAMETERS = 134_515_008
WEIGHTS_FILE = "model.safetensors"
MANIFEST_FILE = "manifest.json"
REQUIRED_FILES = ("config.json", WEIGHTS_FILE, "tokenizer.json", "tokenizer_config.json")
FETCH_COMMAND = "python -m workshop_utils fetch"


class LanguageModelNotFetched(RuntimeError):
    """The cache holds no model, or a damaged one. One line that ends with what to do."""


def model_folder() -> Path:
    """Where fetch puts the model: a folder in this user's cache, whether it is there or not."""
    return cache_folder() / MODEL_NAME.rpartition("/")[2]


def is_fetched() -> bool:
    """Whether all files are there with the sizes of the manifest. Milliseconds."""
    try:
        check_files(model_folder(), hashes=False)
    except LanguageModelNotFetched:
        return False
    return True


def check_files(folder: Path, *, hashes: bool) -> dict:
    """The manifest of `folder`, after its files were compared with it: bytes, and SHA-256 where `hashes`.

    Raises LanguageModelNotFetched where there is no model, or a file is missing, truncated or damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        raise LanguageModelNotFetched(
            f"SmolLM2-135M-Instruct is not in the cache yet: run `{FETCH_COMMAND}`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(folder / MANIFEST_FILE, "cannot be read") from None
    for name in sorted({*REQUIRED_FILES, *files}):
        if name not in files:
            raise _damaged(folder / MANIFEST_FILE, f"says nothing about {name}")
        problem = _difference(folder / name, *files[name], hashes)
        if problem:
            raise _damaged(folder / name, problem)
    return manifest


def load_language_model(
    dtype: torch.dtype = torch.float32, *, stand_in: bool = False
) -> tuple[nn.Module, object]:
    """(model, tokenizer) from the cache, in eval mode on the CPU, with weights of `dtype`. About a second.

    The weights are kept as bfloat16: 538 MB in memory as float32, 269 MB as bfloat16. Their SHA-256 is compared first.
    With stand_in, where the model is not fetched, a tiny random network with a byte tokenizer takes its place, and a
    line says so. Raises LanguageModelNotFetched where the model is missing or damaged and there is no stand-in.
    """
    folder = model_folder()
    try:
        check_files(folder, hashes=True)
    except LanguageModelNotFetched as error:
        if not stand_in:
            raise
        from workshop_utils.stand_in import tiny_language_model

        print(f"{error}. Until then a tiny random network stands in: its answers and figures mean nothing.")
        return tiny_language_model(dtype)
    return load_folder(folder, dtype)


def load_folder(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, object]:
    """(model, tokenizer) from a folder that transformers wrote, without network, progress bars or checks."""
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    bars_were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    finally:
        if bars_were_on:
            logging.enable_progress_bar()
    model.name_or_path = model.config._name_or_path = MODEL_NAME  # what a saved adapter names as its base
    return model.eval(), tokenizer


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _difference(path: Path, expected_bytes: int, expected_sha256: str, hashes: bool) -> str:
    try:
        got_bytes = path.stat().st_size
        if got_bytes != expected_bytes:
            return f"has {got_bytes:,} bytes, expected {expected_bytes:,}"
        if hashes and sha256_of(path) != expected_sha256:
            return "has another SHA-256 than when it was fetched"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""


def _damaged(path: Path, problem: str) -> LanguageModelNotFetched:
    return LanguageModelNotFetched(f"{path} {problem}: run `{FETCH_COMMAND}`, which replaces it")
