"""The settings of a plan: what can be chosen, and what goes together. Notebook 08."""

from collections.abc import Sequence
from dataclasses import dataclass

from workshop_utils.model_specs import ModelSpec

STRATEGIES = ("single", "ddp", "zero1", "zero2", "fsdp")
METHODS = ("full", "lora", "qlora")
PRECISIONS = ("fp32", "bf16-mixed", "bf16")

# Bytes of one of Adam's moments, for one parameter. None: the dtype of the parameter, as torch's. bitsandbytes: always
# float32, or 8 bits with a float32 scale for each block of 256 (Dettmers et al. 2022, arXiv:2110.02861). Paged ones
# hold the same, where the GPU or the host has room.
OPTIMIZERS = {"adamw": None, "adamw-32bit": 4.0, "adamw-8bit": 1 + 4 / 256}

DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class PlanSettings:
    """One choice of everything, checked. `plan_memory` says what each means; ValueError where they do not fit."""

    spec: ModelSpec
    strategy: str
    world_size: int
    method: str
    precision: str
    batch_size: int
    length: int
    offload: bool
    checkpointing: bool
    r: int
    target_modules: tuple[
        str, ...
    ]  # names of a block's linear layers with an adapter; () in full fine-tuning
    lora_dropout: bool
    optimizer: str
    double_quant: bool
    shard_scales: bool

    def __post_init__(self):
        for name, choices in (
            ("strategy", STRATEGIES),
            ("method", METHODS),
            ("precision", PRECISIONS),
            ("optimizer", OPTIMIZERS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(choices)}"
                )
        for name in ("world_size", "batch_size", "length", "r"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number, 1 or more, got {value!r}")
        if self.strategy == "single" and self.world_size != 1:
            raise ValueError(
                f"strategy single has 1 GPU, got {self.world_size}: choose one of {', '.join(STRATEGIES[1:])}"
            )
        if self.offload and self.strategy != "fsdp":
            raise ValueError(
                f"offload is FSDP's: choose strategy fsdp (1 GPU is enough for it), not {self.strategy}"
            )
        if self.spec.fixed_length not in (None, self.length):
            raise ValueError(
                f"{self.spec.name} has {self.spec.fixed_length} tokens an image: leave out length, got {self.length}"
            )

    @property
    def tokens(self) -> int:
        """T: tokens of one GPU's batch."""
        return self.batch_size * self.length

    @property
    def number_bytes(self) -> int:
        """c: bytes of a number in the dtype of the arithmetic."""
        return 4 if self.precision == "fp32" else 2

    @property
    def adapter_number_bytes(self) -> int:
        """Bytes of a number in the adapters' arithmetic: mixed, they compute in float32, unless FSDP casts them."""
        return 4 if self.is_mixed and self.strategy != "fsdp" else self.number_bytes

    @property
    def is_mixed(self) -> bool:
        """Arithmetic in bf16, what is trained in float32."""
        return self.precision == "bf16-mixed"


def default_length(spec: ModelSpec) -> int:
    """Tokens of a sequence where nobody said how many: an image's own, or DEFAULT_LENGTH."""
    return spec.fixed_length or DEFAULT_LENGTH


def adapter_targets(spec: ModelSpec, method: str, target_modules: str | Sequence[str]) -> tuple[str, ...]:
    """Names of the linear layers of a block that get an adapter; ValueError with the choices for others."""
    names = tuple(name for name, _, _ in spec.linears)
    if method == "full":
        return ()
    if target_modules == "all-linear":
        return names
    wanted = (target_modules,) if isinstance(target_modules, str) else tuple(target_modules)
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        raise ValueError(
            f"target_modules {', '.join(unknown) or 'are empty'}: choose all-linear, or some of {', '.join(names)}"
        )
    return wanted
