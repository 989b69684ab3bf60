"""The plan's formulas beside figures that others published. Notebook 08 shows the table.

A row's settings are those of its source; nothing is adjusted to meet the figure. A source that was read by us is
"primary"; a figure that we know from notes or from memory is "reported".
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from workshop_utils.memory_plan import MemoryPlan, plan_memory
from workshop_utils.model_specs import ModelSpec

GB, GIB = 10**9, 2**30
QLORA = "Dettmers et al. 2023, arXiv:2305.14314, appendix"
FSDP_QLORA = "AnswerDotAI/fsdp_qlora, benchmarks_03_2024.md"
FSDP_QLORA_README = "AnswerDotAI/fsdp_qlora, README.md"
PEFT = "huggingface/peft, docs/source/accelerate/fsdp.md"
ZERO = "Rajbhandari et al. 2020, arXiv:1910.02054, figure 1"

_WITHOUT_O = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
_SINGLE_WHY = (
    "The paper's bar for the base alone is higher than 4.127 bits for the blocks and bf16 for embedding and head "
    "(7B: 5.05 against 3.87 GB, reported). It does not say what is in it; float32 embeddings would be 0.5 GB. The gap "
    "grows more slowly than the model."
)
_RESERVED_WHY = (
    "The figure is memory reserved by torch's allocator, not memory in use. For LoRA the same page gives both, 10.24 "
    "reserved and 8.28 in use; for this run it gives the first only."
)


@dataclass(frozen=True)
class PublishedRow:
    """One published figure and what the formulas say. Bytes; `unit_bytes` is what the source counts in, GB or GiB."""

    name: str
    predicted_bytes: float
    published_bytes: float
    unit_bytes: int
    why: str
    source: str
    reliability: str  # "primary" or "reported"

    @property
    def predicted(self) -> float:
        """In the source's unit."""
        return self.predicted_bytes / self.unit_bytes

    @property
    def published(self) -> float:
        """In the source's unit."""
        return self.published_bytes / self.unit_bytes

    @property
    def unit(self) -> str:
        """ "GB" or "GiB"."""
        return "GB" if self.unit_bytes == GB else "GiB"

    @property
    def error(self) -> float:
        """(predicted - published) / published."""
        return self.predicted_bytes / self.published_bytes - 1


def predicted_against_published() -> list[PublishedRow]:
    """All rows: QLoRA's paper, fsdp_qlora, PEFT's documentation, ZeRO's paper."""
    return [*_qlora_rows(), *_fsdp_qlora_rows(), *_peft_rows(), *_zero_rows()]


def published_table() -> str:
    """The rows as text."""
    lines = [f"{'':44}{'predicted':>12}{'published':>12}{'error':>8}  source"]
    for row in predicted_against_published():
        published = f"{row.published:.4g} {row.unit}"
        where = row.source + ("" if row.reliability == "primary" else " (reported)")
        lines.append(
            f"{row.name:44}{row.predicted:>8.1f} {row.unit:3}{published:>12}{row.error:>8.0%}  {where}"
        )
    return "\n".join(lines)


def _qlora_rows() -> list[PublishedRow]:
    """One GPU, batch 1, 512 tokens, checkpointing, r = 64 on all linear layers, bf16, moments in float32."""
    return [
        _row(
            f"QLoRA {size.upper()}, 1 GPU, 512 tokens",
            plan_memory(
                f"llama-1-{size}",
                method="qlora",
                precision="bf16",
                length=512,
                checkpointing=True,
                r=64,
                lora_dropout=True,
                optimizer="adamw-32bit",
            ),
            figure * GB,
            GB,
            _SINGLE_WHY,
            QLORA,
            "reported",
        )
        for size, figure in (("7b", 6.9), ("13b", 11.3), ("33b", 24.7), ("65b", 45.0))
    ]


def _fsdp_qlora_rows() -> list[PublishedRow]:
    """Two GPUs, FSDP1, pure bf16, checkpointing, r = 64 with dropout on all linear layers but attention's last."""

    def plan(model: str, method: str, **settings) -> MemoryPlan:
        return plan_memory(
            model,
            "fsdp",
            2,
            method=method,
            precision="bf16",
            checkpointing=True,
            r=64,
            lora_dropout=True,
            target_modules=_WITHOUT_O,
            shard_scales=False,
            **settings,
        )

    large = plan("llama-2-70b", "qlora", batch_size=2, length=2048, offload=True)
    lora, longer = (plan("llama-2-7b", "lora", length=length) for length in (512, 2048))
    in_use = "Memory in use, the quantity that the formulas predict."
    rows = [
        ("QLoRA 70B, FSDP + offload on 2, 2 x 2048", large, 14.92, _RESERVED_WHY),
        ("QLoRA 7B, FSDP on 2, 512 tokens", plan("llama-2-7b", "qlora", length=512), 4.98, _RESERVED_WHY),
        ("LoRA 7B, FSDP on 2, 512 tokens, reserved", lora, 10.24, _RESERVED_WHY),
        ("LoRA 7B, FSDP on 2, 512 tokens, in use", lora, 8.28, in_use),
        ("LoRA 7B, FSDP on 2, 2048 tokens, in use", longer, 9.16, in_use),
    ]
    return [
        *(
            _row(name, plan, figure * GIB, GIB, why, FSDP_QLORA, "primary")
            for name, plan, figure, why in rows
        ),
        _row(
            "QLoRA 70B, FSDP + offload: host",
            large,
            55 * GB,
            GB,
            'The figure is "roughly", and includes loading: whole layers pass through the host before they are divided.',
            FSDP_QLORA_README,
            "primary",
            of=lambda plan: plan.host_bytes,
        ),
    ]


def _peft_rows() -> list[PublishedRow]:
    """70B on two GPUs, batch 2, 2048 tokens, r = 8 with dropout on all linear layers, checkpointing, flash attention."""
    plans = [
        plan_memory(
            "llama-2-70b",
            "fsdp",
            2,
            method="qlora",
            precision="bf16-mixed",
            batch_size=2,
            length=2048,
            checkpointing=True,
            lora_dropout=True,
            shard_scales=False,
            offload=offload,
        )
        for offload in (True, False)
    ]
    why = (
        "The source does not say what was read; with nvidia-smi it is the process: memory reserved, and CUDA's context "
        "and NCCL's buffers, which are no tensors of the step."
    )
    host_why = (
        "The formulas count what stays: one copy of the shards. The figure is the machine's use with loading, pinned "
        "copies (torch's pinned allocator rounds each up to a power of two) and two Python processes."
    )
    return [
        _row("QLoRA 70B, FSDP + offload on 2 (PEFT)", plans[0], 19.6 * GB, GB, why, PEFT, "primary"),
        _row("QLoRA 70B, FSDP on 2 (PEFT)", plans[1], 35.6 * GB, GB, why, PEFT, "primary"),
        _row(
            "QLoRA 70B, FSDP + offload (PEFT): host",
            plans[0],
            107 * GB,
            GB,
            host_why,
            PEFT,
            "primary",
            of=lambda plan: plan.host_bytes,
        ),
    ]


def _zero_rows() -> list[PublishedRow]:
    """7.5 billion parameters on 64 GPUs, mixed precision: states only, which is all that the figure counts."""
    spec = replace(
        ModelSpec.from_name("llama-2-7b"),
        name="7.5 B",
        linear_parameters=7_500_000_000,
        embedding_parameters=0,
        head_parameters=0,
        norm_parameters=0,
    )
    return [
        _row(
            f"7.5 B, full, {label} on 64",
            plan_memory(spec, strategy, 64),
            figure * GB,
            GB,
            "Parameters, gradients and optimizer state: 16 bytes for each parameter, divided. The same formula.",
            ZERO,
            "reported",
            of=lambda plan: plan.parameters_bytes + plan.gradients_bytes + plan.optimizer_bytes,
        )
        for label, strategy, figure in (
            ("DDP", "ddp", 120),
            ("ZeRO-1", "zero1", 31.4),
            ("ZeRO-2", "zero2", 16.6),
            ("ZeRO-3, FSDP", "fsdp", 1.9),
        )
    ]


def _row(
    name: str,
    plan: MemoryPlan,
    published_bytes: float,
    unit_bytes: int,
    why: str,
    source: str,
    reliability: str,
    *,
    of: Callable[[MemoryPlan], float] = lambda plan: plan.total_bytes,
) -> PublishedRow:
    return PublishedRow(name, of(plan), published_bytes, unit_bytes, why, source, reliability)
