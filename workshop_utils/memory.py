"""What a training step holds: bytes of parameters, gradients, optimizer state, buffers and activations.

Taught in notebook 01. Everything here is read from the tensors that exist, nothing is estimated
(`plan_memory` does that, notebook 08): a storage that two tensors share (tied weights, views of one flat buffer)
counts once, and whole.

Units: bytes everywhere; MiB = 2**20 bytes.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from workshop_utils.memory_plan import plan_memory  # noqa: F401 (bytes predicted, in a module of its own)


@dataclass(frozen=True)
class MemoryReport:
    """Bytes by kind. `activations_bytes` is 0 where none were recorded."""

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    buffers_bytes: int
    activations_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The sum of all kinds."""
        return sum(self.by_kind().values())

    def by_kind(self) -> dict[str, int]:
        """{"parameters": bytes, ...}, in the order in which a step fills them."""
        return {
            "parameters": self.parameters_bytes,
            "buffers": self.buffers_bytes,
            "activations": self.activations_bytes,
            "gradients": self.gradients_bytes,
            "optimizer": self.optimizer_bytes,
        }

    def __str__(self) -> str:
        lines = [f"{kind:<12}{count:>14,} bytes" for kind, count in self.by_kind().items() if count]
        return "\n".join([*lines, f"{'total':<12}{self.total_bytes:>14,} bytes"])


@dataclass
class SavedActivations:
    """What autograd kept between a forward and its backward, the model's own tensors left out.

    `tensors` holds (shape, dtype) in the order of saving; a tensor that two operations saved is there twice,
    but its bytes count once.
    """

    tensors: list[tuple[tuple[int, ...], torch.dtype]] = field(default_factory=list)
    _ranges: dict[int, list[tuple[int, int]]] = field(default_factory=dict, repr=False)

    @property
    def total_bytes(self) -> int:
        """Bytes that the saved tensors cover, each byte once."""
        return sum(_covered_bytes(ranges) for ranges in self._ranges.values())

    def add(self, tensor: Tensor) -> None:
        """Record one saved tensor. It is not kept alive."""
        self.tensors.append((tuple(tensor.shape), tensor.dtype))
        self._ranges.setdefault(_storage_id(tensor), []).append(_byte_range(tensor))


def measure_memory(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    activations: SavedActivations | None = None,
) -> MemoryReport:
    """Bytes that `model`, its gradients and `optimizer` hold right now in this process, by kind.

    Gradients and optimizer state exist only after a first backward and a first step: before that they are 0.
    Pass what `record_activations` gave to have the activations in the report too.
    """
    parameters = list(model.parameters())
    state = optimizer.state.values() if optimizer is not None else ()
    return MemoryReport(
        parameters_bytes=held_bytes(parameters),
        gradients_bytes=held_bytes(p.grad for p in parameters if p.grad is not None),
        optimizer_bytes=held_bytes(_tensors_in(list(state))),
        buffers_bytes=held_bytes(model.buffers()),
        activations_bytes=activations.total_bytes if activations is not None else 0,
    )


# (parameters, gradients, optimizer) under Adam. bf16-mixed computes in bf16 and updates in float32, so the optimizer
# holds a float32 copy of the parameter and two moments. fp32 and bf16 use one dtype for everything.
BYTES_PER_PARAMETER = {"bf16-mixed": (2, 2, 12), "fp32": (4, 4, 8), "bf16": (2, 2, 4)}


def zero_bytes(
    stage: int, num_parameters: int, world_size: int, precision: str = "bf16-mixed"
) -> dict[str, float]:
    """Predicted bytes per rank of parameters, gradients and optimizer state, under Adam.

    In bf16-mixed a parameter takes 2 bytes (bf16), its gradient 2, and Adam 12: a float32 copy of it and two moments.
    Stage 0 holds all of it on every rank (data parallel, or one device). ZeRO stage 1 divides the optimizer state by
    world_size, stage 2 the gradients too, stage 3 the parameters too (Rajbhandari et al. 2020, arXiv:1910.02054,
    figure 1). Padding is left out. Raises ValueError for another stage or precision.
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"stage must be 0 (nothing divided), 1, 2 or 3, got {stage!r}")
    if precision not in BYTES_PER_PARAMETER:
        raise ValueError(f"unknown precision {precision!r}: choose one of {', '.join(BYTES_PER_PARAMETER)}")
    if num_parameters < 0 or world_size < 1:
        raise ValueError(
            f"num_parameters {num_parameters} and world_size {world_size} must be 0 and 1 or more"
        )
    whole = dict(zip(("parameters", "gradients", "optimizer"), BYTES_PER_PARAMETER[precision]))
    divided_from = {"parameters": 3, "gradients": 2, "optimizer": 1}
    return {
        kind: num_parameters * size / (world_size if stage >= divided_from[kind] else 1)
        for kind, size in whole.items()
    }


@contextmanager
def record_activations(model: nn.Module) -> Iterator[SavedActivations]:
    """Record what autograd saves for the backward of one forward (loss included) inside the `with` block.

    Parameters and buffers that autograd saves are left out: they are there anyway, and counted elsewhere.
    """
    own = {_storage_id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    saved = SavedActivations()

    def pack(tensor):
        if _storage_id(tensor) not in own:
            saved.add(tensor)
        return tensor.detach()  # the tensor itself would make a reference cycle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        yield saved


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages under `tensors`, each storage once and whole."""
    return sum({_storage_id(t): t.untyped_storage().nbytes() for t in tensors}.values())


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # the address of the storage object; its data may be empty


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    """First byte and end of what the tensor reads in its storage."""
    if tensor.numel() == 0:
        return 0, 0
    size = tensor.element_size()
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.storage_offset() * size
    return start, start + (last + 1) * size


def _covered_bytes(ranges: list[tuple[int, int]]) -> int:
    """Length of the union of half-open ranges."""
    covered = reached = 0
    for start, end in sorted(ranges):
        covered += max(0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def _tensors_in(value) -> Iterator[Tensor]:
    """Every tensor in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors_in(inner)
