"""The training of notebooks 03, 04 and 08 as a script: one process, DDP or FSDP, on one machine or on many.

    python -m workshop_utils.train --strategy single
    torchrun --standalone --nproc-per-node=4 -m workshop_utils.train --strategy ddp
    torchrun --standalone --nproc-per-node=2 -m workshop_utils.train \
        --model smollm2 --strategy fsdp --lora-r 8 --quantize nf4 --checkpoint-dir records

The first two train a classifier of digits. The last teaches SmolLM2, held in 4 bits and sharded, to write a sentence as
a JSON record: a LoRA adapter is trained, and its checkpoints hold the adapter only (train_tasks.py has both tasks).

torchrun starts the processes and tells each its rank in environment variables. Everything else is here: the group
(nccl where each process has a GPU, otherwise gloo), the wrapping, the share of the batch, checkpoints.

A global batch of --batch-size is cut into one share for each rank, and the loss is weighted so that uneven shares
count right. So the losses are those of one process, whatever the number of ranks. With --checkpoint-dir the run
goes on from the newest checkpoint there, also after a kill, and ends with the weights of an undisturbed run.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import platform
import re
import statistics
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from workshop_utils.checkpoints import (
    CheckpointError,
    from_all_ranks,
    load_newest,
    save_checkpoint,
    weights_sha256,
)
from workshop_utils.language_model import LanguageModelNotFetched, check_files, model_folder
from workshop_utils.point_to_point import gloo_bytes_sent
from workshop_utils.train_options import parse, problem_with, told
from workshop_utils.train_tasks import MODELS


@dataclass
class Run:
    """What this process has done. A run that went on from a checkpoint has done the steps since."""

    resumed_at: int = 0
    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    bytes_sent: int | None = (
        None  # by the collectives of the steps; None where the system does not tell, and for nccl
    )


def main(arguments: list[str] | None = None) -> None:
    """Never returns: the process ends here, with 0, 2 (cannot run so) or 1 (failed on the way)."""
    rank = told("RANK", 0)
    with contextlib.redirect_stderr(io.StringIO()) if rank else contextlib.nullcontext():
        options = parse(arguments)  # what is wrong with the command line is said once
    if problem := problem_with(options):
        end(2, problem if rank == 0 else None)
    try:
        if options.model == "smollm2":
            check_files(model_folder(), hashes=False)
        device = join_group(options)
        run, model, task = train(options, device)
        tell(options, run, model, task)
    except LanguageModelNotFetched as error:
        end(2, str(error) if told("LOCAL_RANK", 0) == 0 else None)  # each host has a cache of its own
    except CheckpointError as error:
        end(2, str(error) if rank == 0 else None)
    except OSError as error:
        end(1, f"{error.filename or 'cannot write'}: {error.strerror}. {how_to_go_on(options)}")
    except RuntimeError as error:
        if not (dist.is_initialized() and _LOST_PEER.search(str(error))):
            raise
        end(1, f"rank {rank}: another rank is gone ({reason(error)}). {how_to_go_on(options)}")
    end(0)


_LOST_PEER = re.compile(r"gloo|NCCL|[Cc]onnection|[Tt]imed out|[Bb]roken pipe")


def reason(error: RuntimeError) -> str:
    """The first line of what gloo or nccl says, without the place in its own source."""
    return re.sub(r"^\[[^\]]*\] *", "", str(error).splitlines()[0]).split(". ")[0]


def how_to_go_on(options: argparse.Namespace) -> str:
    if not options.checkpoint_dir:
        return "Nothing is saved without --checkpoint-dir: the next start begins at step 0."
    return (
        f"The checkpoints in {options.checkpoint_dir} are whole: torchrun goes on from the newest if it has restarts "
        "left (--max-restarts); otherwise start the same command again."
    )


def end(status: int, message: str | None = None) -> None:
    """Leave at once. Python's own way out of a process that had a group sometimes aborts, with everything done."""
    if message:
        print(f"train: {message}", file=sys.stderr)
    if status == 0 and dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# ----------------------------------------------------------------------------- the group


def join_group(options: argparse.Namespace) -> torch.device:
    """Join the process group that torchrun's variables describe, unless this run is single. Returns the device."""
    device = choose_device(told("LOCAL_RANK", 0), told("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if options.strategy != "single":
        timeout = datetime.timedelta(seconds=options.timeout_s)
        one_machine = told("LOCAL_WORLD_SIZE", 1) == told("WORLD_SIZE", 1)
        if one_machine:  # nothing has to leave it
            loopback = "lo0" if platform.system() == "Darwin" else "lo"
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        if one_machine:
            # torchrun keeps one store for all attempts: without a name of its own, an attempt may read where the
            # processes of the one before were listening, and wait for the dead. Several hosts need not have counted
            # the same number of restarts: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes a new store each time.
            store = dist.PrefixStore(f"attempt {told('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return device


def choose_device(local_rank: int, local_world_size: int) -> torch.device:
    """The GPU with this rank's number where the host has one for each of its ranks, otherwise the CPU.

    All ranks of a host choose alike, and nccl, which refuses two ranks on one GPU, goes with the GPUs and gloo with the
    CPU. So all hosts of a run must have GPUs for their ranks, or none.
    """
    if torch.cuda.device_count() >= local_world_size:
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def place() -> tuple[int, int]:
    """This process's rank and the world size; 0 and 1 without a group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wrap(task, options: argparse.Namespace, device: torch.device) -> nn.Module:
    """The task's model as the strategy trains it. It does not know that it is parallel."""
    model = task.model
    if options.strategy == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        wrapped = DistributedDataParallel(model)
        # DDP orders its buckets anew after its first backward, and another order sums to other last bits. Done before
        # the first step, a run that goes on from a checkpoint sums as one that never stopped.
        task.warm_up(wrapped).backward()
        wrapped.zero_grad()
        return wrapped
    if options.strategy == "fsdp":
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        # of the group that is there: where CUDA is, init_device_mesh("cpu", ...) makes a second one, with nccl in it
        mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
        for module in model.modules():
            if type(module).__name__ == task.unit_type:
                fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return model


# ----------------------------------------------------------------------------- the training


def train(options: argparse.Namespace, device: torch.device) -> tuple[Run, nn.Module, object]:
    """All steps that are still to be done, from the newest checkpoint on."""
    torch.manual_seed(options.seed)
    task = MODELS[options.model](options, device)
    model = wrap(task, options, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=options.learning_rate)
    settings = {name: getattr(options, name) for name in ("model", "batch_size", "learning_rate", "seed")}
    settings |= task.settings
    run = Run()
    if options.checkpoint_dir:
        run.resumed_at = load_newest(options.checkpoint_dir, settings, model, optimizer)
    if run.resumed_at > options.steps:
        raise CheckpointError(
            f"{options.checkpoint_dir} is at step {run.resumed_at} already, and --steps is {options.steps}: "
            "ask for more steps, or choose another --checkpoint-dir"
        )
    quiet = True if place()[0] else None  # None: a bar if somebody looks at a terminal
    with tqdm(total=options.steps, initial=run.resumed_at, unit="step", disable=quiet) as bar:
        for step, batch in enumerate(task.batches(options.steps), start=1):
            if step <= run.resumed_at:
                continue
            timed_step(run, model, optimizer, task, batch)
            bar.update()
            if options.checkpoint_dir and (step == options.steps or step % options.checkpoint_every == 0):
                save_checkpoint(options.checkpoint_dir, step, settings, model, optimizer)
    return run, model, task


def timed_step(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, task, batch) -> None:
    """`train_share`, with its loss, its seconds and its bytes noted."""
    on_sockets = not dist.is_initialized() or dist.get_backend() == "gloo"  # what nccl sends, nobody counts
    sent, began_s = gloo_bytes_sent() if on_sockets else None, time.perf_counter()
    run.losses.append(train_share(model, optimizer, task, batch))
    run.step_s.append(time.perf_counter() - began_s)
    if sent is not None:
        run.bytes_sent = (run.bytes_sent or 0) + gloo_bytes_sent() - sent


def train_share(model: nn.Module, optimizer: torch.optim.Optimizer, task, batch) -> float:
    """One step on this rank's share of the batch. Returns the mean loss of the whole batch."""
    rank, world_size = place()
    optimizer.zero_grad()
    total, count = task.loss_sum(model, batch, rank, world_size)
    # DDP and FSDP divide by the number of ranks. Shares may differ in size, so a mean of means would be wrong.
    (total * world_size / count).backward()
    optimizer.step()
    return float(add_up(total.detach())) / count


@torch.no_grad()
def accuracy(model: nn.Module, task) -> float:
    """The share of the test set that is right, each sample counted once."""
    model.eval()
    right, count = task.num_right(model, *place())
    return float(add_up(right)) / count


def add_up(value: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


# ----------------------------------------------------------------------------- the result


def tell(options: argparse.Namespace, run: Run, model: nn.Module, task) -> None:
    """Rank 0 prints one line and writes the report. All must call."""
    rank, world_size = place()
    result = {
        "strategy": options.strategy,
        "model": options.model,
        "world_size": world_size,
        "hosts": world_size // told("LOCAL_WORLD_SIZE", 1),
        "backend": dist.get_backend() if dist.is_initialized() else None,
        "steps": options.steps,
        "resumed_at": run.resumed_at,
        "accuracy": accuracy(model, task),
        "weights_sha256": weights_sha256(model),
        "bytes_sent": from_all_ranks(run.bytes_sent),
        "losses": run.losses,
        "step_s": run.step_s,
    }
    if rank == 0:
        if options.report:
            options.report.write_text(json.dumps(result) + "\n", encoding="utf-8")
        print(summary(result))


def summary(result: dict) -> str:
    count = result["world_size"]
    who = "1 process" if count == 1 else f"{count} processes, {result['backend']}"
    done = f"{result['steps']} steps" + (f", from {result['resumed_at']} on" if result["resumed_at"] else "")
    pace = f", {statistics.median(result['step_s']) * 1e3:.1f} ms a step" if result["step_s"] else ""
    loss = f", loss {result['losses'][-1]:.4f}" if result["losses"] else ""
    return (
        f"{result['strategy']}, {who}: {done}{pace}{loss}, accuracy {result['accuracy']:.3f}, "
        f"weights {result['weights_sha256'][:12]}"
    )


if __name__ == "__main__":
    main()
