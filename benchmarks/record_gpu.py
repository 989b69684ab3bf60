"""Record what needs a GPU: memory beside the planner, a QLoRA step beside the libraries', FSDP on one GPU.

    python benchmarks/record_gpu.py [PART ...]

Needs torch with CUDA, transformers, and of this repository nothing but its files: no data, no fetched model, no network.
All networks have random weights in the shapes of the models that they are named after. Prints tables and writes
benchmarks/recorded_gpu.json after each part, so an interrupted recording keeps what it has (--output FILE writes
elsewhere). That file is not in the repository until somebody with a GPU has run this. What cannot be measured is named
under "skipped", with the reason. Parts:

    memory          the fullest moment of a training step, and what plan_memory says of it; CUDA's own share
    qlora_step      SmolLM2's shape, the same tokens: ours, PEFT with bitsandbytes, LoRA in bfloat16, in turns
    fsdp            fully_shard on this one GPU (nccl), with CPU offload and with checkpointing
    nf4             quantise and dequantise a weight of 4,096 x 4,096: ours, bitsandbytes, in turns
    small_networks  steps of the MLP of notebooks 05 and 06, on the CPU and on the GPU

Bytes are those of torch's allocator (max_memory_allocated): tensors, and cuBLAS' work space. Seconds are medians.
"""

import argparse
import contextlib
import copy
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # a machine with torch needs no installation

import on_gpu
import torch
from torch import nn

from workshop_utils.lora import apply_lora, lora_layers
from workshop_utils.memory import plan_memory
from workshop_utils.memory_plan import RESERVE_BYTES
from workshop_utils.model_specs import ModelSpec
from workshop_utils.models import MLP
from workshop_utils.quantization import dequantize_nf4, quantize_nf4
from workshop_utils.subspace import RandomSubspace
from workshop_utils.training import train_step

OUTPUT = ROOT / "benchmarks/recorded_gpu.json"
MEMORY = [  # model, method, precision, checkpointing, batch, length
    ("smollm2", "full", "fp32", False, 8, 512),
    ("smollm2", "full", "bf16", False, 8, 512),
    ("smollm2", "full", "bf16", True, 8, 512),
    ("smollm2", "lora", "bf16", False, 8, 512),
    ("smollm2", "qlora", "bf16-mixed", False, 8, 512),
    ("smollm2", "qlora", "bf16-mixed", True, 8, 512),
    ("llama-1b", "full", "bf16", True, 4, 1024),
    ("llama-1b", "lora", "bf16", True, 4, 1024),
    ("llama-1b", "qlora", "bf16-mixed", True, 4, 1024),
    ("llama-8b", "qlora", "bf16-mixed", True, 1, 2048),
]


# ----------------------------------------------------------------------------- the parts


def memory(skipped: dict, cases=MEMORY) -> list[dict]:
    rows = [cuda_itself()]
    for name, method, precision, checkpointing, batch_size, length in cases:
        case = (
            f"{name} {method} {precision}{' checkpointing' if checkpointing else ''}, {batch_size} x {length}"
        )
        settings = {"method": method, "precision": precision, "checkpointing": checkpointing}
        plan = plan_memory(name, "single", 1, batch_size=batch_size, length=length, r=on_gpu.R, **settings)
        on_gpu.empty()
        # the plan, and the weights in 16 bits that quantising begins with
        needed = plan.total_bytes + 2 * ModelSpec.from_name(name).num_parameters * (method == "qlora")
        if needed > (free := torch.cuda.mem_get_info()[0]):
            skipped[f"memory: {case}"] = f"{needed / 2**30:.0f} GiB needed, {free / 2**30:.0f} free"
            continue
        with unless_impossible(skipped, f"memory: {case}"):
            model = on_gpu.prepared(name, method, precision, checkpointing)
            measured = on_gpu.measured_step(model, on_gpu.tokens(name, batch_size, length))
            rows.append({"case": case, "plan_bytes": plan.total_bytes, "plan_peak": plan.peak} | measured)
            del model
    return rows


def cuda_itself() -> dict:
    """What the process holds on the card beyond torch's tensors, after one matrix product, beside the planner's figure."""
    on_gpu.empty()
    x = torch.ones(64, 64, device=on_gpu.DEVICE)
    x @ x
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved()
    return {
        "case": "CUDA itself (and whoever else is on the card)",
        "plan_bytes": RESERVE_BYTES,
        "peak_bytes": others,
    }


def qlora_step(skipped: dict, name: str = "smollm2", batch_size: int = 8, length: int = 128) -> list[dict]:
    makers = {
        "ours": lambda: on_gpu.prepared(name, "qlora", "fp32", compute_dtype=torch.bfloat16),
        "PEFT + bitsandbytes": lambda: with_libraries(name),
        "LoRA, all in bfloat16": lambda: on_gpu.prepared(name, "lora", "bf16"),
    }
    models, batch = {}, on_gpu.tokens(name, batch_size, length)
    for label, make in makers.items():
        with unless_impossible(skipped, f"qlora_step: {label}"):
            models[label] = make()
    steps = {label: on_gpu.step_of(model, batch) for label, model in models.items()}
    first_losses = {label: step().item() for label, step in steps.items()}
    times_s = on_gpu.in_turns(steps)
    return [
        {
            "case": label,
            "tokens": batch_size * length,
            "first_loss": first_losses[label],
            **on_gpu.spread(times_s[label]),
        }
        for label in models
    ]


def with_libraries(name: str) -> nn.Module:
    """The same network with bitsandbytes' 4-bit layers and PEFT's adapters, whose A are ours."""
    import bitsandbytes
    import peft

    ours, model = on_gpu.prepared(name, "lora", "fp32"), on_gpu.llama(name, torch.float32)
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and path != "lm_head":
            layer = bitsandbytes.nn.Linear4bit(
                *(linear.in_features, linear.out_features),
                bias=False,
                quant_type="nf4",
                compute_dtype=torch.bfloat16,
            )
            layer.load_state_dict({"weight": linear.weight.detach().cpu()})
            model.set_submodule(path, layer.to(on_gpu.DEVICE))  # this quantises
    model.is_loaded_in_4bit = True
    config = peft.LoraConfig(
        r=on_gpu.R, lora_alpha=on_gpu.LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for path, layer in lora_layers(ours):
            theirs = wrapped.get_submodule(f"base_model.model.{path}").lora_A["default"].weight
            theirs.copy_(layer.lora_A.weight)
    return wrapped.train()


def fsdp(skipped: dict, name: str = "smollm2", batch_size: int = 8, length: int = 512) -> list[dict]:
    rows = []
    batch = on_gpu.tokens(name, batch_size, length)
    with on_gpu.group_of_one():
        for method in ("full", "qlora"):
            for label, change in ({"no FSDP": None} | on_gpu.SHARDED).items():
                on_gpu.empty()
                with unless_impossible(skipped, f"fsdp: {method}, {label}"):
                    step = on_gpu.step_of(on_gpu.sharded(name, method, change), batch)
                    first_loss = step().item()
                    step()
                    row = {
                        "case": f"{method}, {label}",
                        "first_loss": first_loss,
                        "peak_bytes": on_gpu.peak_bytes(step),
                    }
                    rows.append(row | on_gpu.spread(on_gpu.in_turns({"": step})[""]))
                    del step
    return rows


def nf4(skipped: dict, size: int = 4096) -> list[dict]:
    weights = [
        torch.randn(size, size, device=on_gpu.DEVICE, dtype=t) for t in (torch.float32, torch.bfloat16)
    ]
    return [row for weight in weights for row in nf4_of(skipped, weight)]


def nf4_of(skipped: dict, weight: torch.Tensor) -> list[dict]:
    ours, dtype = quantize_nf4(weight), str(weight.dtype).removeprefix("torch.")
    quantise, dequantise = {"ours": lambda: quantize_nf4(weight)}, {"ours": lambda: dequantize_nf4(ours)}
    with unless_impossible(skipped, f"nf4: {dtype}, bitsandbytes"):
        from bitsandbytes import functional

        options = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": True}
        codes, state = functional.quantize_4bit(weight, **options)
        quantise["bitsandbytes"] = lambda: functional.quantize_4bit(weight, **options)
        dequantise["bitsandbytes"] = lambda: functional.dequantize_4bit(codes, state)
    return [
        {"case": f"{what}, {dtype}, {who}", **on_gpu.spread(times_s)}
        for what, contestants in (("quantise", quantise), ("dequantise", dequantise))
        for who, times_s in on_gpu.in_turns(contestants).items()
    ]


def small_networks(skipped: dict) -> list[dict]:
    torch.manual_seed(0)
    mlp, rows = MLP(), []
    networks = {"all weights": lambda: copy.deepcopy(mlp)}
    networks |= {"LoRA, r = 8": lambda: apply_lora(copy.deepcopy(mlp), "all-linear", 8, 8)}
    for kind in ("one_hot", "sparse", "dense"):
        networks[f"{kind} subspace of 750"] = lambda kind=kind: RandomSubspace(
            copy.deepcopy(mlp), 750, projection=kind
        )
    for label, make in networks.items():
        steps = {}
        for device in ("cpu", on_gpu.DEVICE):
            model, images = make().to(device), torch.rand(128, 784).to(device)
            labels = (torch.arange(128) % 10).to(device)
            optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], fused=True)
            steps[device] = lambda m=model, o=optimizer, x=images, y=labels: train_step(m, o, x, y)
        for device, times_s in on_gpu.in_turns(steps).items():
            rows.append({"case": f"MLP, {label}, batch of 128, {device}", **on_gpu.spread(times_s)})
    return rows


PARTS = {part.__name__: part for part in (memory, qlora_step, fsdp, nf4, small_networks)}


# ----------------------------------------------------------------------------- the record


@contextlib.contextmanager
def unless_impossible(skipped: dict, what: str):
    """Note under `what` why the block inside could not run, and go on: a missing package, no memory, an old version."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  the reasons are many, and each is written down
        skipped[what] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    finally:
        on_gpu.empty()


def machine() -> dict:
    versions = {}
    for package in ("torch", "transformers", "peft", "bitsandbytes"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    card = torch.cuda.get_device_properties(0)
    return {
        "command": "python benchmarks/record_gpu.py",
        "recorded": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{card.name}, {card.total_memory / 2**30:.0f} GiB; {os.cpu_count()} cores, {platform.system()}",
        "versions": versions | {"cuda": torch.version.cuda, "python": platform.python_version()},
    }


def table(rows: list[dict]) -> str:
    """Markdown, a column for each key; bytes as GB, seconds as ms."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    heads = [key.replace("_bytes", " GB").replace("_s", " ms").replace("_", " ") for key in keys]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(keys) + "|"]
    return "\n".join(
        [*lines, *("| " + " | ".join(cell(key, row.get(key)) for key in keys) + " |" for row in rows)]
    )


def cell(key: str, value) -> str:
    if isinstance(value, (int, float)) and key.endswith("_bytes"):
        return f"{value / 1e9:.3f}"
    if isinstance(value, float):
        return f"{value * 1e3:.3f}" if key.endswith("_s") else f"{value:.4f}"
    return "" if value is None else str(value)


def record(parts: list[str], output: Path) -> dict:
    found = machine() | {"parts": {}, "skipped": {}}
    for name in parts:
        rows = []
        with unless_impossible(found["skipped"], name):
            rows = PARTS[name](found["skipped"])
        found["parts"][name] = rows
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"\n## {name}\n\n{table(rows)}", flush=True)
    for what, why in found["skipped"].items():
        print(f"\nskipped: {what}: {why}")
    print(f"\n{found['machine']}, {found['versions']}; written to {output}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args()
    if unknown := set(chosen.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        sys.exit("record_gpu: torch sees no CUDA device here, so there is nothing to record")
    record(chosen.parts or list(PARTS), chosen.output)
