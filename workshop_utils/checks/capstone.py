"""The capstone of notebook 08: a configuration for 8B on two GPUs of 16 GB, judged by the planner (memory_plan.py)."""

from itertools import product

from workshop_utils.checks import Wrong

LENGTH, CARD_BYTES, HOST_BYTES = 4096, 16 * 2**30, 64e9
CHOICES = {
    "strategy": ("ddp", "zero1", "zero2", "fsdp"),
    "method": ("full", "lora", "qlora"),
    "checkpointing": (False, True),
    "offload": (False, True),
    "batch_size": (1, 2, 3, 4),
}
SLOWEST = 1.25  # of the best seconds per token that fit
HELPS = {
    "parameters": "fewer bits (method), or divide them (strategy)",
    "gradients": "train fewer numbers (method), or divide them (strategy)",
    "optimizer": "train fewer numbers (method), or divide it (strategy)",
    "activations": "checkpointing, or a smaller batch; no strategy divides them",
    "logits": "a smaller batch; they are 12 bytes for each score of each token",
    "temporary": "a strategy that gathers less, or fewer bits",
}


def judge(answer) -> str:
    """Wrong with the reason why the configuration does not do, or a sentence on why it does."""
    settings = _checked(answer)
    plan = _plan(settings)
    _expect_fits(plan)
    _expect_largest(plan, answer["largest"])
    best, best_plan = _best()
    ratio = _token_s(settings, plan) / _token_s(best, best_plan)
    if ratio > SLOWEST:
        raise Wrong(
            f"it fits, with {_spare_gib(plan):.1f} GiB to spare, but takes {1e3 * _token_s(settings, plan):.2f} ms for a "
            f"token, {ratio:.1f} times as long as the best that fits: {_why_slow(settings, plan)}"
        )
    return (
        f"it fits, with {_spare_gib(plan):.1f} GiB to spare. A step sends {plan.traffic_bytes / 1e9:.2f} GB and takes "
        f"{plan.serial_step_s:.2f} s, {plan.communication_s / plan.serial_step_s:.0%} of it communication if nothing "
        f"overlaps: {ratio:.2f} times the best per token, which is {_words(best)}"
    )


def _checked(answer) -> dict:
    """The settings without "largest"."""
    keys = [*CHOICES, "largest"]
    if not isinstance(answer, dict):
        raise Wrong(f"your configuration is {answer!r:.80}, expected a dict with {', '.join(keys)}")
    for word, odd in (("missing", set(keys) - answer.keys()), ("no setting", answer.keys() - set(keys))):
        if odd:
            raise Wrong(f"{word}: {', '.join(sorted(map(str, odd)))}. The keys are {', '.join(keys)}")
    if answer["strategy"] not in CHOICES["strategy"]:
        choices = ", ".join(CHOICES["strategy"])
        raise Wrong(
            f"strategy is {answer['strategy']!r}, expected one of {choices} (ZeRO-3); there are two GPUs"
        )
    return {key: answer[key] for key in CHOICES}


def _plan(settings: dict):
    from workshop_utils.memory_plan import plan_memory

    others = {key: value for key, value in settings.items() if key != "strategy"}
    try:
        return plan_memory("llama-8b", settings["strategy"], 2, length=LENGTH, **others)
    except (TypeError, ValueError) as error:
        raise Wrong(f"the planner refuses these settings: {error}") from None


def _expect_fits(plan) -> None:
    from workshop_utils.memory_plan import RESERVE_BYTES

    if not plan.fits(CARD_BYTES):
        kinds = sorted(plan.by_kind().items(), key=lambda item: -item[1])[:2]
        shown = ", ".join(f"{kind} {size / 2**30:.1f}" for kind, size in kinds)
        total = (plan.total_bytes + RESERVE_BYTES) / 2**30
        raise Wrong(
            f"it does not fit: {total:.1f} GiB on each GPU, CUDA's {RESERVE_BYTES / 2**30:.1f} included, and there are "
            f"16. Most of it: {shown}. Against {kinds[0][0]}: {HELPS[kinds[0][0]]}"
        )
    if plan.host_bytes > HOST_BYTES:
        raise Wrong(
            f"the GPUs would hold it, but the host needs {plan.host_bytes / 1e9:.0f} GB for what is offloaded, and has "
            f"{HOST_BYTES / 1e9:.0f}"
        )


def _expect_largest(plan, largest) -> None:
    by_kind = plan.by_kind()
    actual = max(by_kind, key=by_kind.get)
    if largest not in by_kind:
        raise Wrong(f"largest is {largest!r}, expected one of {', '.join(by_kind)}")
    if largest != actual:
        raise Wrong(
            f"it fits, but {largest} are not the largest kind: {by_kind[largest] / 2**30:.1f} GiB of it, and {actual} "
            f"{by_kind[actual] / 2**30:.1f}. Who defends a choice knows what fills the card"
        )


def _best() -> tuple[dict, object]:
    """The settings, and their plan, with the fewest seconds per token among those that fit."""
    fitting = []
    for values in product(*CHOICES.values()):
        settings = dict(zip(CHOICES, values, strict=True))
        if settings["offload"] and settings["strategy"] != "fsdp":
            continue
        plan = _plan(settings)
        if plan.fits(CARD_BYTES) and plan.host_bytes <= HOST_BYTES:
            fitting.append((_token_s(settings, plan), len(fitting), settings, plan))
    return min(fitting)[2:]


def _token_s(settings: dict, plan) -> float:
    """Seconds for a token of one GPU if nothing overlaps."""
    return plan.serial_step_s / (settings["batch_size"] * LENGTH)


def _spare_gib(plan) -> float:
    from workshop_utils.memory_plan import RESERVE_BYTES

    return (CARD_BYTES - RESERVE_BYTES - plan.total_bytes) / 2**30


def _why_slow(settings: dict, plan) -> str:
    share = plan.communication_s / plan.serial_step_s
    host = " and to the host and back" if settings["offload"] else ""
    return f"{share:.0%} of a step is communication, {plan.traffic_bytes / 1e9:.1f} GB between the GPUs{host}"


def _words(settings: dict) -> str:
    on = [key for key in ("checkpointing", "offload") if settings[key]]
    return ", ".join([settings["strategy"], settings["method"], *on, f"batch {settings['batch_size']}"])
