"""Checkpoints of a training run: whole, written in one piece, the same for every strategy. Notebook 03 uses them.

A checkpoint is one file, `step_00000040.pt`, with the state of model and optimizer as one process would have it.
So a run that was sharded over four ranks can go on with two, or with one. Frozen parameters are left out: whoever goes on
has them from where they came. Rank 0 writes; all read, so several hosts
need a folder that all of them see. A file appears under its name only when all of it is on the disk, and the newest two are kept:
whatever is killed, and whenever, there is one to go on from.

For models that no single host can hold, torch.distributed.checkpoint writes a file per rank instead (notebook 04).
"""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

KEEP = 2
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on rank 0; the others get an empty one
_TRAINED = replace(_WHOLE, ignore_frozen_params=True)


class CheckpointError(RuntimeError):
    """A folder or a checkpoint cannot be used. The message is one line that says what to do."""


def save_checkpoint(folder: Path, step: int, settings: dict, model, optimizer) -> None:
    """Write the state after `step` steps. `settings` are those that a run which goes on from here has to share."""
    model_state, optimizer_state = get_state_dict(model, optimizer, options=_TRAINED)
    if _rank() == 0:
        for name in _frozen(model) & model_state.keys():  # torch leaves the second name of a tied one
            del model_state[name]
        content = {"step": step, "settings": settings, "model": model_state, "optimizer": optimizer_state}
        target = folder / f"step_{step:08}.pt"
        unfinished = target.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
        for old in _newest_first(folder)[KEEP:]:
            old.unlink()


def load_newest(folder: Path, settings: dict, model, optimizer) -> int:
    """Bring model and optimizer to the newest checkpoint in `folder`; return its step, 0 where there is none.

    Raises CheckpointError, on all ranks, where the folder cannot be written, the checkpoint is of another run, or a
    rank does not see it. A file that cannot be read is passed over with a warning. All ranks must call.
    """
    file, error = _from_rank_0(_attempt(_find_newest, folder, settings) if _rank() == 0 else None)
    content = None
    if error is None and file is not None:
        content, error = _attempt(_read, file)
    for rank, their_error in enumerate(from_all_ranks(error)):
        if their_error is not None:
            raise CheckpointError(their_error if rank == 0 else f"rank {rank}: {their_error}")
    if content is None:
        return 0
    set_state_dict(
        model,
        optimizer,
        model_state_dict=content["model"],
        optim_state_dict=content["optimizer"],
        options=StateDictOptions(full_state_dict=True, strict=not _frozen(model)),
    )
    return content["step"]


def weights_sha256(model: nn.Module) -> str:
    """A hash of all parameters and buffers, equal if every bit is. All ranks must call; it is rank 0's that counts."""
    digest = hashlib.sha256()
    for name, tensor in sorted(get_model_state_dict(model, options=_WHOLE).items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _frozen(model: nn.Module) -> set[str]:
    """The names of parameters without gradient, each of a tied one, without DDP's prefix."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {name.removeprefix("module.") for name, p in parameters if not p.requires_grad}


def _find_newest(folder: Path, settings: dict) -> Path | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise CheckpointError(
            f"cannot write to {folder} ({error.strerror}): choose another --checkpoint-dir"
        ) from None
    for file in _newest_first(folder):
        try:
            theirs = _read(file)["settings"]
        except CheckpointError as error:
            print(f"train: passing over a damaged checkpoint: {error}", flush=True)
            continue
        for key, mine in settings.items():
            if theirs.get(key) != mine:
                raise CheckpointError(
                    f"{file} was made with {key} {theirs.get(key)}, not {mine}: "
                    "use the same, or another --checkpoint-dir"
                )
        return file
    return None


def _read(file: Path) -> dict:
    """The content of a checkpoint. Its tensors stay in the file until they are used."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is not there: all hosts must see the same --checkpoint-dir") from None
    except Exception as error:  # noqa: BLE001  a damaged file fails in many ways
        raise CheckpointError(f"cannot read {file} ({type(error).__name__})") from None


def _attempt(function, *arguments) -> tuple:
    """(result, None), or (None, the complaint)."""
    try:
        return function(*arguments), None
    except CheckpointError as error:
        return None, str(error)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.pt"), reverse=True)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _from_rank_0(value):
    """What rank 0 has, on all ranks."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_all_ranks(value) -> list:
    """What each rank has, in rank order, on all ranks."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values
