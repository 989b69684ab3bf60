"""What training a model holds on each GPU, sends, and takes: predicted from formulas. Notebook 08 teaches it.

    plan = plan_memory("llama-8b", "fsdp", 2, method="qlora", length=512, checkpointing=True)
    plan.by_kind(); plan.total_bytes; plan.fits(16 * 2**30)

No constant is fitted. Sources, by part:

    states       Rajbhandari et al. 2020 (ZeRO), arXiv:1910.02054, figure 1; Adam's two moments
    4 bits       Dettmers et al. 2023 (QLoRA), arXiv:2305.14314, section 3: 4 + 0.127 bits
    units        Zhao et al. 2023 (FSDP), arXiv:2304.11277, section 3: whole one or two at a time
    activations  Korthikanti et al. 2022, arXiv:2205.05198, section 4; see activation_memory.py
    operations   Kaplan et al. 2020, arXiv:2001.08361, section 2.1: 2 per weight and token, twice that in backward
    links        Thakur et al. 2005; see network.py

Letters: n GPUs, P parameters (of a kind), T tokens of one GPU's batch, c bytes of a number in the arithmetic.
Bytes are bytes: GiB = 2**30, GB = 10**9. A card sold with "24 GB" has about 24 GiB.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from workshop_utils.activation_memory import (
    Trained,
    backward_extra_bytes,
    block_bytes,
    loss_bytes,
    saved_bytes,
)
from workshop_utils.model_specs import ModelSpec
from workshop_utils.network import LINKS, Link
from workshop_utils.plan_cost import communication_seconds, operations

STRATEGIES = ("single", "ddp", "zero1", "zero2", "fsdp")
METHODS = ("full", "lora", "qlora")
PRECISIONS = ("fp32", "bf16-mixed", "bf16")
# Bytes of one of Adam's moments, for one parameter. None: the dtype of the parameter, as torch's. bitsandbytes: always
# float32, or 8 bits with a float32 scale for each block of 256 (Dettmers et al. 2022, arXiv:2110.02861). Paged ones
# hold the same, where the GPU or the host has room.
OPTIMIZERS = {"adamw": None, "adamw-32bit": 4.0, "adamw-8bit": 1 + 4 / 256}
CARDS_GIB = (8, 12, 16, 24, 48, 80)

# What CUDA's context and kernels take before any tensor exists: transformers' documentation, "Model training
# anatomy", prints 1,343 MiB for torch.ones((1, 1)).to("cuda"). It depends on card and versions; fragmentation comes
# on top and is not predicted.
RESERVE_BYTES = 1343 * 2**20

KINDS = ("parameters", "gradients", "optimizer", "activations", "logits", "temporary")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each GPU by kind, at the moment of a step where they are most, and what a step sends and takes."""

    spec: ModelSpec
    settings: dict = field(repr=False)
    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    temporary_bytes: int  # FSDP's whole units, gradients before they are scattered, a dequantised weight
    host_bytes: int  # in the machine's memory, for all GPUs together
    traffic_bytes: float  # sent by one GPU in a step
    host_traffic_bytes: float  # between one GPU and its host in a step
    compute_s: float
    communication_s: float
    peak: str  # "loss" or "backward": the moment that by_kind() describes
    saved_bytes: int  # what autograd keeps from forward to backward: what record_activations counts
    trainable_parameters: int

    def by_kind(self) -> dict[str, int]:
        """{"parameters": bytes on one GPU, ...}, all KINDS."""
        return {kind: getattr(self, f"{kind}_bytes") for kind in KINDS}

    @property
    def total_bytes(self) -> int:
        """The sum of all kinds: tensors only, without RESERVE_BYTES."""
        return sum(self.by_kind().values())

    @property
    def step_s(self) -> float:
        """Seconds of a step where communication hides behind computation as far as it can: the longer of the two."""
        return max(self.compute_s, self.communication_s)

    @property
    def serial_step_s(self) -> float:
        """Seconds of a step where nothing overlaps: the sum of the two."""
        return self.compute_s + self.communication_s

    def fits(self, gpu_bytes: float, reserve_bytes: float = RESERVE_BYTES) -> bool:
        """Whether a GPU with this much memory holds it, `reserve_bytes` left for what is no tensor."""
        return self.total_bytes + reserve_bytes <= gpu_bytes

    def smallest_card_gib(self) -> int | None:
        """The smallest of CARDS_GIB that it fits; None where it fits none of them."""
        return next((card for card in CARDS_GIB if self.fits(card * 2**30)), None)


def plan_memory(
    model_spec: ModelSpec | str,
    strategy: str = "single",
    world_size: int = 1,
    *,
    method: str = "full",
    precision: str = "bf16-mixed",
    batch_size: int = 1,
    length: int | None = None,
    offload: bool = False,
    checkpointing: bool = False,
    r: int = 8,
    lora_dropout: bool = False,
    optimizer: str = "adamw",
    target_modules: str | Sequence[str] = "all-linear",
    double_quant: bool = True,
    shard_scales: bool = True,
    link: Link = LINKS["PCIe 4 x16"],
    host_link: Link = LINKS["PCIe 4 x16"],
    flops_per_s: float = 0.4 * 312e12,
) -> MemoryPlan:
    """Predict what one step of Adam holds on each of `world_size` GPUs, sends, and takes.

    Gradients count whole throughout, as they do when batches are accumulated. DDP's buckets are the gradients
    (gradient_as_bucket_view=True; torch's default holds them twice). Adam works in place (torch's default on a GPU,
    foreach, takes another copy of the parameters for a moment). Attention is flash or sdpa. FSDP's units are the
    blocks, and the root.

    model_spec      a ModelSpec, or one of MODEL_NAMES
    strategy        "single"; "ddp"; "zero1" divides the optimizer's state, "zero2" the gradients too, "fsdp" all
    method          "full", "lora", or "qlora": LoRA on weights in NF4, embedding and head in the arithmetic's dtype
    precision       "fp32"; "bf16-mixed": arithmetic in bf16, float32 master weights; "bf16": bf16 for everything
    batch_size      sequences or images of one GPU in one forward; length: tokens of each (an image fixes its own)
    offload         FSDP's CPU offload: shards of parameters, gradients and optimizer state live in the host's memory
    checkpointing   blocks keep their input only and run again in backward
    r               LoRA's; target_modules: "all-linear" (without the head), or names of a block's linear layers
    lora_dropout    whether dropout stands before LoRA's A: each adapter then saves an input of its own
    optimizer       "adamw": torch's; "adamw-32bit", "adamw-8bit": bitsandbytes'
    double_quant    of NF4's scales; shard_scales: False where each GPU keeps them all, as bitsandbytes under FSDP1 does
    flops_per_s     what one GPU reaches, not its peak. The default is 40% of an A100's 312e12 in bf16: an assumption.
                    Zhao et al. 2023 reach 55 to 60% with 175 billion parameters.

    Raises ValueError, naming the choices, for settings that do not go together.
    """
    spec = ModelSpec.from_name(model_spec) if isinstance(model_spec, str) else model_spec
    length = _checked(
        spec, strategy, world_size, method, precision, batch_size, length, offload, r, optimizer
    )
    targets = _targets(spec, target_modules) if method != "full" else ()
    tokens, c = batch_size * length, 4 if precision == "fp32" else 2
    sizes = _Sizes(
        spec,
        strategy,
        world_size,
        method,
        precision,
        c,
        r,
        targets,
        OPTIMIZERS[optimizer],
        double_quant,
        shard_scales,
        offload,
    )

    if method == "full":
        trained = Trained(tuple(name for name, _, _ in spec.linears), norms=True)
    else:
        trained = Trained(targets, norms=False, r=r, dropout=lora_dropout)
    saved = saved_bytes(spec, tokens, batch_size, trained, checkpointing=checkpointing, c=c)
    one_block = block_bytes(spec, tokens, trained, c=c) if checkpointing else 0
    layers = saved["blocks"] + saved["ends"]
    moments = {
        "loss": (layers, loss_bytes(spec, tokens, batch_size), sizes.root_temporary()),
        "backward": (
            saved["blocks"] + one_block + backward_extra_bytes(spec, tokens, c=c),
            0,
            sizes.root_temporary() + sizes.block_temporary(),
        ),
    }
    peak = max(moments, key=lambda name: sum(moments[name]))
    activations, logits, temporary = moments[peak]
    resident = sizes.resident()
    flops = operations(spec, tokens, length, method, checkpointing, sizes.adapters)
    return MemoryPlan(
        spec=spec,
        settings={
            "strategy": strategy,
            "world_size": world_size,
            "method": method,
            "precision": precision,
            "batch_size": batch_size,
            "length": length,
            "offload": offload,
            "checkpointing": checkpointing,
            "r": r if method != "full" else None,
            "optimizer": optimizer,
        },
        **{f"{kind}_bytes": 0 if offload else round(size) for kind, size in resident.items()},
        activations_bytes=round(activations),
        logits_bytes=round(logits),
        temporary_bytes=round(temporary + (sizes.kept_whole() if offload else 0)),
        host_bytes=round(world_size * sum(resident.values())) if offload else 0,
        traffic_bytes=sizes.traffic(),
        host_traffic_bytes=sizes.host_traffic() if offload else 0.0,
        compute_s=flops / flops_per_s,
        communication_s=communication_seconds(sizes.messages(), world_size, link)
        + (host_link.message_s(sizes.host_traffic()) if offload else 0.0),
        peak=peak,
        saved_bytes=sum(saved.values()),
        trainable_parameters=sizes.trainable,
    )


class _Sizes:
    """Bytes of the parts of a model under one choice of method, precision and strategy."""

    def __init__(
        self,
        spec,
        strategy,
        world_size,
        method,
        precision,
        c,
        r,
        targets,
        moment_bytes,
        double_quant,
        shard_scales,
        offload,
    ):
        self.spec, self.strategy, self.n, self.method, self.c = spec, strategy, world_size, method, c
        self.adapters = spec.num_blocks * sum(
            r * (num_in + num_out) for name, num_in, num_out in spec.linears if name in targets
        )
        self.trainable = spec.num_parameters if method == "full" else self.adapters
        mixed = precision == "bf16-mixed"
        # bytes of one trained parameter: itself, its gradient, Adam's part; and its gradient on the wire
        own = 4 if mixed else c
        moments = 2 * (own if moment_bytes is None else moment_bytes)
        if mixed and method == "full" and strategy != "fsdp":
            self.each = (2, 2, 4 + moments, 2)  # ZeRO's figure 1: the float32 master is the optimizer's
        else:
            self.each = (
                own,
                own,
                moments,
                own,
            )  # mixed: the master is what is sharded, or the adapter itself
        self.offload = offload
        scales_bits = (8 / 64 + 32 / (64 * 256)) if double_quant else 32 / 64
        self.scale_bytes = scales_bits / 8 if method == "qlora" else 0.0
        self.weight_bytes = 0.5 if method == "qlora" else c  # of a frozen weight in a block
        self.shard_scales = shard_scales

    def resident(self) -> dict[str, float]:
        """Parameters, gradients and optimizer state that stay on one GPU (or, offloaded, on the host for it)."""
        spec = self.spec
        own, gradient, optimizer, _ = self.each
        parameters = self.trainable * own / self._divided("fsdp")
        if self.method != "full":
            others = spec.num_parameters - spec.linear_parameters
            frozen = spec.linear_parameters * self.weight_bytes + others * self.c
            scales = spec.linear_parameters * self.scale_bytes
            parameters += frozen / self._divided("fsdp")
            parameters += scales / (self._divided("fsdp") if self.shard_scales else 1)
        return {
            "parameters": parameters,
            "gradients": self.trainable * gradient / self._divided("zero2", "fsdp"),
            "optimizer": self.trainable * optimizer / self._divided("zero1", "zero2", "fsdp"),
        }

    def kept_whole(self) -> float:
        """Bytes on the GPU although the rest is offloaded: scales that are no parameters."""
        return 0.0 if self.shard_scales else self.spec.linear_parameters * self.scale_bytes

    def block_gathered(self) -> float:
        """Bytes of one block, whole, as gathered: weights (4-bit codes stay codes), norms, adapters."""
        spec = self.spec
        weights = spec.block_linear_parameters * (self.weight_bytes if self.method == "qlora" else self.c)
        scales = spec.block_linear_parameters * self.scale_bytes if self.shard_scales else 0.0
        return weights + scales + (spec.block_norm_parameters + self.adapters / spec.num_blocks) * self.c

    def root_gathered(self) -> float:
        """Bytes of what is in no block, whole: embedding, head, final norm."""
        spec = self.spec
        outside = spec.num_parameters - spec.linear_parameters - spec.num_blocks * spec.block_norm_parameters
        return outside * self.c

    def root_temporary(self) -> float:
        """FSDP's root unit, whole from its first use to the end of backward (torch keeps the root whole)."""
        return self.root_gathered() if self.strategy == "fsdp" else 0.0

    def block_temporary(self) -> float:
        """While a block is in backward: two whole blocks (itself and the prefetched), its gradient before it is
        scattered, in the arithmetic's dtype and in that of the wire; the largest weight out of its 4 bits. With
        offload a block's shard comes to the GPU before it is gathered."""
        dequantised = max(i * o for _, i, o in self.spec.linears) * self.c if self.method == "qlora" else 0
        if self.strategy != "fsdp":
            return dequantised
        trained = self._block_trained()
        root_gradient = self.root_gathered() if self.method == "full" else 0.0
        gathered = 2 * self.block_gathered() * (1 + (1 / self.n if self.offload else 0))
        return dequantised + gathered + trained * (self.c + self.each[3]) + root_gradient

    def messages(self) -> list[tuple[str, float, int]]:
        """(collective, bytes of the whole tensor, how often) of one step."""
        wire, spec = self.each[3], self.spec
        if self.strategy == "ddp":
            return [("all_reduce", self.trainable * wire, 1)]
        if self.strategy in ("zero1", "zero2"):
            return [
                ("reduce_scatter", self.trainable * wire, 1),
                ("all_gather", self.trainable * self.each[0], 1),
            ]
        if self.strategy != "fsdp":
            return []
        root_trained = self.trainable - spec.num_blocks * self._block_trained()
        return [
            ("all_gather", self.root_gathered(), 1),
            ("all_gather", self.block_gathered(), 2 * spec.num_blocks),
            ("reduce_scatter", self._block_trained() * wire, spec.num_blocks),
            ("reduce_scatter", root_trained * wire, 1),
        ]

    def traffic(self) -> float:
        """Bytes that one GPU sends in a step, rings: (n-1)/n of each gather and scatter, twice that of an all-reduce."""
        share = (self.n - 1) / self.n
        return sum(
            size * times * share * (2 if kind == "all_reduce" else 1) for kind, size, times in self.messages()
        )

    def host_traffic(self) -> float:
        """Bytes between one GPU and the host in a step with offload: its shards down for each gather, gradients up."""
        gathered = sum(size * times for kind, size, times in self.messages() if kind == "all_gather")
        return (gathered + self.trainable * self.each[1]) / self.n

    def _block_trained(self) -> float:
        """Trained parameters of one block."""
        spec = self.spec
        if self.method == "full":
            return spec.block_linear_parameters + spec.block_norm_parameters
        return self.adapters / spec.num_blocks

    def _divided(self, *strategies: str) -> int:
        """n where one of these strategies is at work, else 1."""
        return self.n if self.strategy in strategies else 1


def _targets(spec: ModelSpec, target_modules) -> tuple[str, ...]:
    """Names of the linear layers of a block that get an adapter."""
    names = tuple(name for name, _, _ in spec.linears)
    if target_modules == "all-linear":
        return names
    wanted = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        raise ValueError(
            f"target_modules {', '.join(unknown) or 'are empty'}: choose all-linear, or some of {', '.join(names)}"
        )
    return wanted


def _checked(spec, strategy, world_size, method, precision, batch_size, length, offload, r, optimizer) -> int:
    """The tokens of one sequence, after everything was looked at."""
    for name, value, choices in (
        ("strategy", strategy, STRATEGIES),
        ("method", method, METHODS),
        ("precision", precision, PRECISIONS),
        ("optimizer", optimizer, OPTIMIZERS),
    ):
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")
    counts = {"world_size": world_size, "batch_size": batch_size, "r": r}
    if length is not None:
        counts["length"] = length
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number, 1 or more, got {value!r}")
    if strategy == "single" and world_size != 1:
        raise ValueError(
            f"strategy single has 1 GPU, got {world_size}: choose one of {', '.join(STRATEGIES[1:])}"
        )
    if offload and strategy != "fsdp":
        raise ValueError(f"offload is FSDP's: choose strategy fsdp (1 GPU is enough for it), not {strategy}")
    if spec.fixed_length is not None:
        if length not in (None, spec.fixed_length):
            raise ValueError(
                f"{spec.name} has {spec.fixed_length} tokens an image: leave out length, got {length}"
            )
        return spec.fixed_length
    return 512 if length is None else length
