"""`python -m workshop_utils plan`: a plan as text. Notebook 08 shows it, memory_plan.py has the formulas."""

import argparse
import sys
from pathlib import Path

from workshop_utils.memory_plan import CARDS_GIB, RESERVE_BYTES, MemoryPlan, plan_memory
from workshop_utils.model_specs import MODEL_NAMES, ModelSpec
from workshop_utils.network import LINKS
from workshop_utils.plan_cost import GPU_PEAK_FLOPS_PER_S
from workshop_utils.plan_settings import METHODS, OPTIMIZERS, PRECISIONS, STRATEGIES

GIB, GB = 2**30, 10**9

_EPILOG = f"""models
  {", ".join(MODEL_NAMES)},
  or the path of any transformers config.json with dense blocks that are alike

Leave out --method or --strategy and you get all of them side by side. Examples:
  plan smollm2                                                    one GPU, every method
  plan llama-8b --gpus 2 --checkpointing                          8B on two GPUs, everything side by side
  plan llama-8b --method qlora --strategy fsdp --gpus 2 --checkpointing
  plan vit-l --method full --strategy fsdp --gpus 2 --batch 16    ViT-L on 2 x 8 GB
  plan llama-2-70b --method qlora --strategy fsdp --gpus 2 --batch 2 --length 2048 --checkpointing --offload
  plan --published                                                the formulas beside published figures

Cards: one sold with 24 GB has about 24 GiB; a plan fits where {RESERVE_BYTES / GIB:.1f} GiB are left for CUDA's context
and kernels. Fragmentation is not predicted: leave some room.
"""


class _OneLine(argparse.ArgumentParser):
    """Says what was wrong in one line."""

    def error(self, message: str):
        self.exit(2, f"plan: {message}\n")


def main(arguments: list[str]) -> int:
    """Print the plan, the comparison or the published table. 0; 2 with one line on stderr for bad input."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.published:
        from workshop_utils.published_memory import published_table

        print(published_table())
        return 0
    if chosen.model is None:
        parser.print_help()
        return 0
    try:
        plans = _plans(chosen)
        print(_details(chosen, *plans.values()) if len(plans) == 1 else _comparison(plans, chosen))
        if chosen.figure:
            _save_figure(plans, chosen)
    except (ValueError, OSError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _OneLine(
        prog="python -m workshop_utils plan",
        description="Predict what training a model holds on each GPU, sends, and takes. Nothing is downloaded or run.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", help="see below")
    add("--method", help=f"{', '.join(METHODS)}; all where left out")
    add("--strategy", help=f"{', '.join(STRATEGIES)}; all that fit the GPUs where left out")
    add("--gpus", type=int, default=1, help="how many, 1 where left out")
    add("--batch", type=int, default=1, help="sequences or images on each GPU, 1")
    add("--length", type=int, help="tokens of a sequence, 512; an image has its own number")
    add("--precision", default="bf16-mixed", help=f"{', '.join(PRECISIONS)}; bf16-mixed")
    add("--optimizer", default="adamw", help=f"{', '.join(OPTIMIZERS)}; adamw")
    add("--checkpointing", action="store_true", help="blocks run again in backward instead of saving")
    add("--offload", action="store_true", help="FSDP's CPU offload of parameters, gradients, optimizer state")
    add("--r", type=int, default=8, help="LoRA's r, 8")
    add("--targets", default="all-linear", help="names of layers with an adapter, with commas; all-linear")
    add("--dropout", action="store_true", help="dropout before LoRA's A: each adapter saves its own input")
    add("--link", default="PCIe 4 x16", help=f"between the GPUs: {', '.join(LINKS)}")
    add("--gpu", default="A100", help=f"for the seconds: {', '.join(GPU_PEAK_FLOPS_PER_S)}; A100")
    add(
        "--utilisation",
        type=float,
        default=0.4,
        help="share of the GPU's peak that is reached, an assumption: 0.4",
    )
    add("--figure", type=Path, metavar="FILE", help="save a picture, .png, .pdf or .svg")
    add("--published", action="store_true", help="the formulas beside published figures, no model needed")
    return parser


def _plans(chosen) -> dict[str, MemoryPlan]:
    """The plans that were asked for, by what differs among them. ValueError for bad input."""
    for name, choices in (("link", LINKS), ("gpu", GPU_PEAK_FLOPS_PER_S)):
        if getattr(chosen, name) not in choices:
            raise ValueError(f"unknown {name} {getattr(chosen, name)!r}: choose one of {', '.join(choices)}")
    if not 0 < chosen.utilisation <= 1:
        raise ValueError(f"utilisation must be above 0 and at most 1, got {chosen.utilisation}")
    is_name = chosen.model in MODEL_NAMES or not ("/" in chosen.model or chosen.model.endswith(".json"))
    spec = ModelSpec.from_name(chosen.model) if is_name else ModelSpec.from_config(chosen.model)
    methods = [chosen.method] if chosen.method else METHODS
    if chosen.strategy:
        strategies = [chosen.strategy]
    elif chosen.offload:
        strategies = ["fsdp"]
    else:
        strategies = ["single"] if chosen.gpus == 1 else STRATEGIES[1:]
    return {
        f"{method}, {strategy}": _plan(chosen, spec, method=method, strategy=strategy)
        for method in methods
        for strategy in strategies
    }


def _plan(chosen, spec: ModelSpec, **changed) -> MemoryPlan:
    settings = {
        "method": chosen.method,
        "strategy": chosen.strategy,
        "world_size": chosen.gpus,
        "precision": chosen.precision,
        "optimizer": chosen.optimizer,
        "batch_size": chosen.batch,
        "length": chosen.length,
        "offload": chosen.offload,
        "checkpointing": chosen.checkpointing,
        "r": chosen.r,
        "lora_dropout": chosen.dropout,
        "target_modules": chosen.targets if chosen.targets == "all-linear" else chosen.targets.split(","),
        "link": LINKS[chosen.link],
        "flops_per_s": chosen.utilisation * GPU_PEAK_FLOPS_PER_S[chosen.gpu],
    }
    return plan_memory(spec, **settings | changed)


def _title(chosen, plan: MemoryPlan) -> str:
    settings = plan.settings
    gpus = f"{settings.world_size} GPU" + ("s" if settings.world_size > 1 else "")
    extras = [name for name in ("checkpointing", "offload") if getattr(settings, name)]
    size = f"{settings.spec.name} ({settings.spec.num_parameters / 1e6:,.0f} M parameters)"
    batch = f"{settings.batch_size} x {settings.length} tokens on each"
    return ", ".join([size, gpus, settings.precision, batch, *extras])


def _details(chosen, plan: MemoryPlan) -> str:
    """One plan in full."""
    lines = [_title(chosen, plan), _method(plan), "", f"on each GPU{'GiB':>14}"]
    lines += [f"  {kind:<14}{size / GIB:>9.2f}" for kind, size in plan.by_kind().items()]
    lines += [f"  {'total':<14}{plan.total_bytes / GIB:>9.2f}   most at the {_PEAK[plan.peak]}"]
    lines += [f"  {'CUDA':<14}{RESERVE_BYTES / GIB:>9.2f}   context and kernels, left free"]
    if plan.host_bytes:
        lines += [
            f"on the host     {plan.host_bytes / GIB:>9.2f}   for all GPUs together, pinned copies and loading not"
        ]
    cards = "  ".join(f"{card} GB {'yes' if plan.fits(card * GIB) else 'no'}" for card in CARDS_GIB)
    lines += ["", f"fits            {cards}"]
    sent = f"{plan.traffic_bytes / GB:.2f} GB sent by each GPU"
    if plan.host_traffic_bytes:
        sent += f", {plan.host_traffic_bytes / GB:.2f} GB between it and the host"
    lines += [f"a step          {sent}"]
    indent, machine = " " * 16, f"({chosen.gpu} at {chosen.utilisation:.0%} of its peak)"
    arithmetic = f"{plan.compute_s:#.3g} s of arithmetic {machine}"
    lines += [f"{indent}{arithmetic}, {plan.communication_s:#.3g} s of communication ({chosen.link})"]
    hidden = f"{plan.step_s:#.3g} s where the shorter hides behind the longer"
    lines += [f"{indent}{hidden}, {plan.serial_step_s:#.3g} s where nothing overlaps"]
    changes = _one_change(chosen, plan)
    return "\n".join([*lines, "", "one change      total GiB", *changes] if changes else lines)


_PEAK = {"loss": "loss, before backward", "backward": "start of backward"}


def _method(plan: MemoryPlan) -> str:
    settings = plan.settings
    trained = f"{plan.trainable_parameters / 1e6:,.1f} M trained"
    adapters = "" if settings.method == "full" else f", r={settings.r} on {' '.join(settings.target_modules)}"
    return f"{settings.method}, {settings.strategy}, {settings.optimizer}: {trained}{adapters}"


def _one_change(chosen, plan: MemoryPlan) -> list[str]:
    """What one other choice would make of the total."""
    settings = plan.settings
    changes = {}
    if not settings.checkpointing:
        changes["--checkpointing"] = {"checkpointing": True}
    for method in METHODS[METHODS.index(settings.method) + 1 :]:
        changes[f"--method {method}"] = {"method": method}
    if settings.strategy != "fsdp" and settings.world_size > 1:
        changes["--strategy fsdp"] = {"strategy": "fsdp"}
    if not settings.offload:
        changes["--offload"] = {"offload": True, "strategy": "fsdp"}
    if settings.batch_size > 1:
        changes["--batch 1"] = {"batch_size": 1}
    base = {"method": settings.method, "strategy": settings.strategy}
    return [
        f"  {name:<18}{_plan(chosen, settings.spec, **base | changed).total_bytes / GIB:>7.2f}"
        for name, changed in changes.items()
    ]


def _comparison(plans: dict[str, MemoryPlan], chosen) -> str:
    """All plans, a line each."""
    has_host = any(plan.host_bytes for plan in plans.values())
    head = f"{'GiB on each GPU':<15}{'total':>9}" + "".join(f"{name:>8}" for name in _SHORT)
    head += (f"{'host':>8}" if has_host else "") + f"{'card':>8}{'GB sent':>9}{'step, s':>9}"
    lines = [_title(chosen, next(iter(plans.values()))), "", head]
    for name, plan in plans.items():
        card = plan.smallest_card_gib()
        sizes = "".join(f"{size / GIB:>8.2f}" for size in plan.by_kind().values())
        sizes += f"{plan.host_bytes / GIB:>8.2f}" if has_host else ""
        lines.append(
            f"{name:<15}{plan.total_bytes / GIB:>9.2f}{sizes}{f'{card} GB' if card else 'none':>8}"
            f"{plan.traffic_bytes / GB:>9.2f}{plan.step_s:>#9.3g}"
        )
    step = f"step: {chosen.gpu} at {chosen.utilisation:.0%} of its peak, {chosen.link}, the shorter of arithmetic and"
    notes = [
        "card: the smallest that holds it. GB sent: by each GPU in a step.",
        f"{step} communication hidden.",
    ]
    return "\n".join([*lines, "", *notes, "Add --method and --strategy for the details of one."])


_SHORT = ("param.", "grad.", "optim.", "activ.", "logits", "temp.")


def _save_figure(plans: dict[str, MemoryPlan], chosen) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from workshop_utils.plotting import use_style
    from workshop_utils.plotting.planner import plot_plans

    use_style()
    plot_plans(_title(chosen, next(iter(plans.values()))), plans).savefig(chosen.figure)
    print(f"\nfigure: {chosen.figure}")
