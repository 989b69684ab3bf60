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
from workshop_utils.plan_settings import PlanSettings, adapter_targets, default_length
from workshop_utils.plan_sizes import PlanSizes

CARDS_GIB = (8, 12, 16, 24, 48, 80)

# What CUDA's context and kernels take before any tensor exists: transformers' documentation, "Model training
# anatomy", prints 1,343 MiB for torch.ones((1, 1)).to("cuda"). It depends on card and versions; fragmentation comes
# on top and is not predicted.
RESERVE_BYTES = 1343 * 2**20

KINDS = ("parameters", "gradients", "optimizer", "activations", "logits", "temporary")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each GPU by kind, at the moment of a step where they are most, and what a step sends and takes."""

    settings: PlanSettings = field(repr=False)
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
    precision       "fp32"; "bf16-mixed": arithmetic in bf16, what is trained in float32 (adapters also compute in
                    float32, as qlora.py's and PEFT's do; FSDP casts them to bf16); "bf16": bf16 for everything
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
    settings = PlanSettings(
        spec=spec,
        strategy=strategy,
        world_size=world_size,
        method=method,
        precision=precision,
        batch_size=batch_size,
        length=default_length(spec) if length is None else length,
        offload=offload,
        checkpointing=checkpointing,
        r=r,
        target_modules=adapter_targets(spec, method, target_modules),
        lora_dropout=lora_dropout,
        optimizer=optimizer,
        double_quant=double_quant,
        shard_scales=shard_scales,
    )
    sizes = PlanSizes(settings)
    resident, passing, host = sizes.resident(), _passing(settings, sizes), 0.0
    if offload:
        host = world_size * (sum(resident.values()) - sizes.scales_whole())
        resident = {"parameters": sizes.scales_whole(), "gradients": 0, "optimizer": 0}
    peak = max(passing, key=lambda moment: sum(passing[moment].values()))
    return MemoryPlan(
        settings=settings,
        **{f"{kind}_bytes": round(size) for kind, size in (resident | passing[peak]).items()},
        host_bytes=round(host),
        traffic_bytes=sizes.traffic(),
        host_traffic_bytes=sizes.host_traffic(),
        compute_s=operations(settings, sizes.adapters) / flops_per_s,
        communication_s=communication_seconds(sizes.messages(), world_size, link)
        + (host_link.message_s(sizes.host_traffic()) if offload else 0.0),
        peak=peak,
        saved_bytes=sum(saved_bytes(settings, _trained(settings)).values()),
        trainable_parameters=sizes.trained,
    )


def _passing(settings: PlanSettings, sizes: PlanSizes) -> dict[str, dict[str, float]]:
    """What exists for a while only, at the two moments where it may be most: {"loss": {kind: bytes}, "backward": ...}.

    At the loss everything is saved and the scores are there with their gradients. In backward of a block (the last
    one, which comes first) the scores are gone; a checkpointed block has run again.
    """
    trained = _trained(settings)
    saved = saved_bytes(settings, trained)
    again = block_bytes(settings, trained) if settings.checkpointing else 0
    return {
        "loss": {
            "activations": saved["blocks"] + saved["ends"],
            "logits": loss_bytes(settings),
            "temporary": sizes.temporary_at_loss(),
        },
        "backward": {
            "activations": saved["blocks"] + again + backward_extra_bytes(settings),
            "logits": 0,
            "temporary": sizes.temporary_in_backward(),
        },
    }


def _trained(settings: PlanSettings) -> Trained:
    if settings.method == "full":
        return Trained(tuple(name for name, _, _ in settings.spec.linears), norms=True)
    return Trained(
        settings.target_modules,
        norms=False,
        r=settings.r,
        dropout=settings.lora_dropout,
        adapter_bytes=settings.adapter_number_bytes,
    )
