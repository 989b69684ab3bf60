"""Record SmolLM2 on two gloo ranks: strategies and methods, FSDP's settings one at a time, stability over seeds.

    python benchmarks/record_fsdp_qlora.py

writes workshop_utils/recorded_fsdp_qlora.json, which notebook 08 shows. About half an hour on two idle cores; needs
`python -m workshop_utils fetch`. Each run is a small file in build/fsdp_qlora, named by its settings. What is there is
not run again, so the command goes on where it was interrupted; delete the folder after a change of what is trained.
`--only strategies` (or settings, stability) runs one part.

All runs teach the workshop's sentences (records.py), a global batch of 8, with AdamW. Rows of the JSON:

    strategies   single, ddp, fsdp x full, lora, qlora in float32: bytes by kind on rank 0, bytes sent by rank 0 in a
                 step, median seconds of a step, losses of the first steps (equal across strategies)
    settings     FSDP with LoRA, and one thing changed: the same, and `peak_whole_bytes` of parameters
    stability    FSDP with QLoRA in bf16, one thing changed: losses of each step for each seed, bytes that states take

Bytes are bytes. `activations` is what autograd keeps between forward and backward, its own copy of each byte once.
`sent_bytes` is what the kernel counted on the rank's connections, with the workshop's ring as reduce-scatter.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from workshop_utils import start_ranks, sub_world

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "workshop_utils/recorded_fsdp_qlora.json"
RUNS = ROOT / "build/fsdp_qlora"
WORLD_SIZE, BATCH_SIZE, LORA_ALPHA_PER_R = 2, 8, 2
SEEDS = (0, 1, 2)
MEASURED_STEPS, STABILITY_STEPS = 4, 16
RUNS_PER_START = 5  # then the ranks are new ones: memory that a run has used is not all given back


@dataclass(frozen=True)
class Settings:
    """One run. Everything but the changed fields stays as it is here."""

    strategy: str = "fsdp"
    method: str = "lora"
    dtype: str = "float32"  # of the arithmetic; "bfloat16" under FSDP2's mixed precision, adapters in float32
    reduce_dtype: str = "float32"  # of gradients on the wire
    state_dtype: str = "float32"  # of the adapter, its gradient and Adam's moments
    offload: bool = False
    checkpointing: bool = False
    units: str = "block"  # or "layer", "model"
    reshard: bool = True  # after forward
    parts: int = 1  # of the batch, accumulated
    synchronise: str = "every part"  # or "last part"
    learning_rate: float = 4e-4
    r: int = 8
    seed: int = 0
    steps: int = MEASURED_STEPS
    measured: bool = True  # bytes and seconds, beside the losses

    @property
    def file(self) -> Path:
        """Its name has what differs from the defaults."""
        default = asdict(Settings())
        changed = [f"{key}-{value}" for key, value in asdict(self).items() if value != default[key]]
        return RUNS / f"{'_'.join(changed).replace(' ', '-') or 'default'}.json"


STRATEGIES = [  # the single process accumulates what are the ranks' shares elsewhere: the losses are equal then
    Settings(strategy=strategy, method=method, parts=WORLD_SIZE if strategy == "single" else 1)
    for method in ("full", "lora", "qlora")
    for strategy in ("single", "ddp", "fsdp")
]
CHANGES = {
    "nothing": {},
    "bf16 arithmetic": {"dtype": "bfloat16"},
    "base in NF4": {"method": "qlora"},
    "checkpointing": {"checkpointing": True},
    "CPU offload": {"offload": True},
    "a unit per layer": {"units": "layer"},
    "one unit": {"units": "model"},
    "kept whole after forward": {"reshard": False},
    "2 parts": {"parts": 2},
    "2 parts, one reduction": {"parts": 2, "synchronise": "last part"},
}
_STABLE = {"method": "qlora", "dtype": "bfloat16", "steps": STABILITY_STEPS, "measured": False}
VARIATIONS = {
    "learning rate 4e-4, r = 8": {},
    "reduced in bf16": {"reduce_dtype": "bfloat16"},
    "adapter and Adam in bf16": {"reduce_dtype": "bfloat16", "state_dtype": "bfloat16"},
    "LoRA on bf16": {"method": "lora"},
    "learning rate 1e-4": {"learning_rate": 1e-4},
    "learning rate 2e-3": {"learning_rate": 2e-3},
    "learning rate 1e-2": {"learning_rate": 1e-2},
    "r = 2": {"r": 2},
    "r = 32": {"r": 32},
}


# ----------------------------------------------------------------------------- on a rank


def run(settings: Settings) -> dict | None:
    """Train as the settings say, on this rank; None on a rank that has no part in it."""
    warnings.filterwarnings("ignore")
    world_size = 1 if settings.strategy == "single" else dist.get_world_size()
    with sub_world(world_size) as inside:
        if not inside:
            return None
        model, tokenizer = make_model(settings)
        model = distribute(model, settings)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0, foreach=False)
        found = train(model, optimizer, tokenizer, settings)
    del model, trained, optimizer
    gc.collect()  # hooks make cycles: the next run needs the memory
    return found


def make_model(settings: Settings):
    """SmolLM2 with the method's layers; adapters drawn from one seed, so that all ranks begin alike."""
    from workshop_utils.language_model import load_language_model
    from workshop_utils.lora import apply_lora

    dtype = getattr(torch, settings.dtype)
    model, tokenizer = load_language_model(dtype if settings.method != "full" else torch.float32)
    torch.manual_seed(1000 + settings.seed)
    alpha = LORA_ALPHA_PER_R * settings.r
    if settings.method == "lora":
        apply_lora(model, "all-linear", settings.r, alpha)
    if settings.method == "qlora":
        from workshop_utils.qlora import SHARDABLE_STORAGE, apply_qlora

        dtypes = {"compute_dtype": dtype, "quant_storage": SHARDABLE_STORAGE}
        apply_qlora(model, "all-linear", settings.r, alpha, **dtypes)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, settings.state_dtype))
    if settings.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train(), tokenizer


def distribute(model: nn.Module, settings: Settings) -> nn.Module:
    """DDP, FSDP, or the model itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    from workshop_utils.ring_in_fsdp import use_ring_reduce_scatter

    if settings.strategy == "single":
        return model
    if settings.strategy == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    low = settings.dtype == "bfloat16"
    options = {
        "mesh": init_device_mesh("cpu", (dist.get_world_size(),)),
        "reshard_after_forward": settings.reshard,
        "offload_policy": CPUOffloadPolicy(pin_memory=False) if settings.offload else OffloadPolicy(),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if low else None,
            reduce_dtype=getattr(torch, settings.reduce_dtype) if low else None,
        ),
    }
    blocks = list(model.model.layers)
    if settings.units == "layer":
        units = [layer for block in blocks for layer in block.modules() if hasattr(layer, "lora_A")]
    else:
        units = blocks if settings.units == "block" else []
    for unit in units:
        fully_shard(unit, **options)
    fully_shard(model, **options)
    use_ring_reduce_scatter(model)
    return model


def train(model, optimizer, tokenizer, settings: Settings) -> dict:
    from workshop_utils.records import training_batches

    losses, step_s = [], []
    batches = list(training_batches(settings.steps, BATCH_SIZE, tokenizer, settings.seed))
    for batch in batches:
        dist.barrier()
        began_s = time.perf_counter()
        losses.append(one_step(model, optimizer, batch, settings))
        step_s.append(time.perf_counter() - began_s)
    found = {"losses": [round(loss, 5) for loss in losses], "step_s": round(statistics.median(step_s[1:]), 4)}
    found["held_bytes"] = held(model, optimizer)
    if settings.measured:
        found |= bytes_of_a_step(model, optimizer, batches[0], settings)
    return found


def one_step(model, optimizer, batch: dict, settings: Settings) -> float:
    """Forward and backward of this rank's share of the batch, in parts, and an update. The loss of the global batch."""
    rank, n = dist.get_rank(), dist.get_world_size()
    optimizer.zero_grad()
    shares = [{k: v.chunk(n * settings.parts)[rank * settings.parts + i] for k, v in batch.items()}
              for i in range(settings.parts)]  # fmt: skip
    total = torch.zeros(())
    for i, share in enumerate(shares):
        last = i == len(shares) - 1
        if settings.synchronise == "last part":
            model.set_requires_gradient_sync(last)
        loss = model(**share, use_cache=False).loss / settings.parts
        loss.backward()
        total += loss.detach().float()
    optimizer.step()
    dist.all_reduce(total)
    return (total / n).item()


def held(model, optimizer) -> dict[str, int]:
    """Bytes by kind that stay on this rank between steps."""
    from workshop_utils.memory import held_bytes

    parameters = list(model.parameters())
    state = [value for values in optimizer.state.values() for value in values.values()]
    gradients = [p.grad for p in parameters if p.grad is not None]
    kinds = {"parameters": [*parameters, *model.buffers()], "gradients": gradients, "optimizer": state}
    return {kind: held_bytes(map(local, tensors)) for kind, tensors in kinds.items()}


def local(tensor):
    return getattr(tensor, "_local_tensor", tensor).detach()


def bytes_of_a_step(model, optimizer, batch, settings: Settings) -> dict:
    """Bytes that this rank sends in a step, activations that it keeps, parameters that are whole at most."""
    from workshop_utils.memory import record_activations
    from workshop_utils.probes import count_collectives, sent_bytes

    def step():
        one_step(model, optimizer, batch, settings)

    found = {"sent_bytes": sent_bytes(step)}
    if settings.strategy == "fsdp":
        seen = count_collectives(model, step)
        found |= {"peak_whole_bytes": seen.peak_bytes, "gathers": seen.all_gathers}
        for module in model.modules():
            if hasattr(module, "unshard"):
                module.unshard()  # so that gathered parameters are not taken for activations
    n = dist.get_world_size() * settings.parts
    with record_activations(model) as saved:
        loss = model(**{k: v.chunk(n)[0] for k, v in batch.items()}, use_cache=False).loss
    found["activations_bytes"] = saved.total_bytes
    del loss
    return found


# ----------------------------------------------------------------------------- here


def jobs(part: str | None) -> list[Settings]:
    """All runs, those that show most first."""
    by_part = {
        "strategies": STRATEGIES,
        "settings": [Settings(**change) for change in CHANGES.values()],
        "stability": [
            Settings(**{**_STABLE, **change, "seed": seed})
            for seed in SEEDS
            for change in VARIATIONS.values()
        ],
    }
    return [job for name, listed in by_part.items() if part in (None, name) for job in listed]


def record(part: str | None) -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    todo = [job for job in dict.fromkeys(jobs(part)) if not job.file.exists()]
    print(f"{len(todo)} runs to do", flush=True)
    for start in range(0, len(todo), RUNS_PER_START):
        with start_ranks(WORLD_SIZE) as ranks:
            for job in todo[start : start + RUNS_PER_START]:
                began_s = time.perf_counter()
                found = ranks.run(run, job)[0]
                unfinished = job.file.with_suffix(".unfinished")
                unfinished.write_text(json.dumps(found), encoding="utf-8")
                os.replace(unfinished, job.file)
                took = f"{time.perf_counter() - began_s:.0f} s, loss {found['losses'][-1]:.3f}"
                print(f"{job.file.stem}: {took}", flush=True)


def write() -> None:
    """Collect the runs that are there."""

    def result(settings: Settings) -> dict | None:
        return json.loads(settings.file.read_text(encoding="utf-8")) if settings.file.exists() else None

    strategies = [
        {"strategy": s.strategy, "method": s.method, **found} for s in STRATEGIES if (found := result(s))
    ]
    settings = [{"changed": name, **found} for name, c in CHANGES.items() if (found := result(Settings(**c)))]
    stability = []
    for name, change in VARIATIONS.items():
        runs = [result(Settings(**{**_STABLE, **change, "seed": seed})) for seed in SEEDS]
        runs = [found for found in runs if found]
        if runs:
            states = sum(runs[0]["held_bytes"].values())
            curves = [found["losses"] for found in runs]
            stability.append({"changed": name, "held_bytes": states, "losses": curves})
    record = {
        "command": "python benchmarks/record_fsdp_qlora.py",
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, torch {torch.__version__}",
        "recorded": time.strftime("%Y-%m-%d"),
        "model": "SmolLM2-135M-Instruct",
        "world_size": WORLD_SIZE,
        "batch_size": BATCH_SIZE,
        "strategies": strategies,
        "settings": settings,
        "stability": stability,
    }
    text = json.dumps(record, indent=1)
    for row in (r for part in (strategies, settings, stability) for r in part):  # one row a line
        text = text.replace(json.dumps(row, indent=1).replace("\n", "\n  "), json.dumps(row))
    TARGET.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {TARGET.name}: {len(strategies)}, {len(settings)} and {len(stability)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description="Record what notebook 08 shows.")
    parser.add_argument("--only", choices=("strategies", "settings", "stability"))
    record(parser.parse_args().only)
    write()


if __name__ == "__main__":
    main()
