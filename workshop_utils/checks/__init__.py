"""What tells a learner that an exercise is right, or why not. pytest uses the same functions.

There is one module per notebook: checks of notebook 02 are in `nb02.py`. A check is a function:

    @exercise("2.3", needs_ranks=True)
    def check_ring(answer, ranks):
        inputs = tensors_for_ranks(len(ranks), (7,))
        results = ranks.run(_run_in_place, answer, inputs)
        for rank, got in enumerate(results):
            expect_close(got, sum(inputs), rank=rank, name="the tensor")
        return "the sum is right on every rank"

It raises `Wrong` with a complaint for the reader, or returns one short sentence for the reader who
passed. It never decides by what the answer says of itself: expected values come from inputs that the
check keeps for itself, and no value is compared with itself.

Shape letters: n is the number of ranks; the other shapes are the exercise's own.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass


class Wrong(AssertionError):
    """The answer is not right. The text is for the learner: which rank, which index, got, expected."""


@dataclass(frozen=True)
class Exercise:
    """A registered check. `run(answer, ranks)` returns the success sentence or raises."""

    id: str
    function: Callable
    needs_ranks: bool

    def run(self, answer, ranks=None) -> str:
        """Judge `answer`; `ranks` is a running `Ranks` where `needs_ranks` is true."""
        sentence = self.function(answer, ranks) if self.needs_ranks else self.function(answer)
        return sentence or ""


_registry: dict[str, Exercise] = {}


def exercise(exercise_id: str, *, needs_ranks: bool = False):
    """Register the decorated function as the check of `exercise_id` ("<notebook>.<number>")."""

    def register(function):
        known = _registry.get(exercise_id)
        if known is not None and known.function.__module__ != function.__module__:
            raise ValueError(f"exercise {exercise_id} has two checks: {known.function} and {function}")
        _registry[exercise_id] = Exercise(exercise_id, function, needs_ranks)
        return function

    return register


def get(exercise_id: str) -> Exercise:
    """The check of `exercise_id`. KeyError, naming the nearest ids, where there is none."""
    if exercise_id not in _registry:
        _load_modules()
    if exercise_id not in _registry:
        raise KeyError(no_such_exercise(exercise_id, all_ids()))
    return _registry[exercise_id]


def all_ids() -> list[str]:
    """Every registered exercise id, in the order of the series."""
    _load_modules()
    return sorted(_registry, key=id_order)


def id_order(exercise_id: str) -> tuple:
    """Sort key that puts 2.10 after 2.9."""
    return tuple(int(part) if part.isdigit() else part for part in exercise_id.split("."))


def no_such_exercise(exercise_id, known) -> str:
    """One sentence that names the nearest known ids."""
    near = difflib.get_close_matches(str(exercise_id), list(known), n=3, cutoff=0.5) or list(known)[:6]
    return f"There is no exercise {exercise_id!r}." + (f" Did you mean {' or '.join(near)}?" if near else "")


def _load_modules():
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("nb"):
            importlib.import_module(f"{__name__}.{module.name}")


# What checks are made of. Each raises Wrong with rank, index, got and expected.


def expect_close(got, expected, *, rank=None, name="the result", rtol=1e-5, atol=1e-6):
    """`got` is a tensor of `expected`'s shape and dtype with its values, within the tolerances.

    Use rtol=0, atol=0 for exact equality. NaN equals nothing.
    """
    import torch

    where = _where(rank)
    expected = torch.as_tensor(expected)
    if got is None:
        raise Wrong(f"{where}{name} is None, expected {_brief(expected)}. Is a `return` missing?")
    if not isinstance(got, torch.Tensor):
        raise Wrong(f"{where}{name} is of type {type(got).__name__} ({got!r:.60}), expected a tensor")
    if got.shape != expected.shape:
        raise Wrong(f"{where}{name} has shape {list(got.shape)}, expected {list(expected.shape)}")
    if got.dtype != expected.dtype:
        raise Wrong(f"{where}{name} has dtype {got.dtype}, expected {expected.dtype}")
    if got.numel() and got.data_ptr() == expected.data_ptr():
        raise RuntimeError(f"this check compares {name} with itself: it must keep a copy of its own")
    got = got.detach().cpu()
    far = ~torch.isclose(got, expected, rtol=rtol, atol=atol) if got.is_floating_point() else got != expected
    if not far.any():
        return
    if got.numel() <= 8:
        raise Wrong(f"{where}{name} is {_brief(got)}, expected {_brief(expected)}")
    index = tuple(far.nonzero()[0].tolist())
    raise Wrong(
        f"{where}{name}{list(index)} is {_brief(got[index])}, expected {_brief(expected[index])}"
        f" ({int(far.sum())} of {far.numel()} elements are wrong)"
    )


def expect_equal(got, expected, *, rank=None, name="the result"):
    """`got == expected` for plain values: numbers, strings, lists."""
    if got is None and expected is not None:
        raise Wrong(f"{_where(rank)}{name} is None, expected {expected!r}. Is a `return` missing?")
    if type(got) is not type(expected) and not isinstance(got, (int, float)):
        raise Wrong(f"{_where(rank)}{name} is of type {type(got).__name__}, expected {expected!r}")
    if got != expected:
        raise Wrong(f"{_where(rank)}{name} is {got!r:.200}, expected {expected!r:.200}")


def expect_number(got, expected, *, rank=None, name="the result", rtol=1e-6):
    """`got` is a number (int, float, one-element tensor) within `rtol` of `expected`."""
    try:
        value = float(got)
    except (TypeError, ValueError, RuntimeError):
        missing = ". Is a `return` missing?" if got is None else ""
        raise Wrong(
            f"{_where(rank)}{name} is {got!r:.60}, expected the number {expected:,}{missing}"
        ) from None
    if not abs(value - expected) <= rtol * abs(expected):
        raise Wrong(f"{_where(rank)}{name} is {value:,.10g}, expected {expected:,.10g}")


def expect_at_most(got, budget, *, rank=None, name, unit=""):
    """`got` does not exceed the budget that the exercise states."""
    if got > budget:
        raise Wrong(f"{_where(rank)}{name}: {got:,.6g} {unit}, the budget is {budget:,.6g} {unit}".strip())


def expect_unchanged(tensor, before, *, rank=None, name="the input"):
    """`tensor` still holds what the check's own copy `before` holds."""
    import torch

    if not torch.equal(tensor, before):
        raise Wrong(f"{_where(rank)}{name} was changed: now {_brief(tensor)}, before {_brief(before)}")


def tensors_for_ranks(world_size, shape, *, dtype=None, seed=0) -> list:
    """One tensor of `shape` per rank, all different, of small whole numbers.

    Small whole numbers add up exactly in float32 and int64, and up to 256 in bfloat16, so a sum has one
    right value whatever the order of the additions.
    """
    import torch

    generator = torch.Generator().manual_seed(1000 + seed)
    tensors = [torch.randint(-9, 10, tuple(shape), generator=generator) for _ in range(world_size)]
    return [(tensor + rank + 1).to(dtype or torch.float32) for rank, tensor in enumerate(tensors)]


def _where(rank) -> str:
    return "" if rank is None else f"rank {rank}: "


def _brief(tensor) -> str:
    if tensor.numel() == 1:
        return f"{tensor.item():.6g}" if tensor.is_floating_point() else str(tensor.item())
    values = tensor.flatten()[:8].tolist()
    words = [f"{value:.6g}" if isinstance(value, float) else str(value) for value in values]
    return "[" + ", ".join(words) + (", …]" if tensor.numel() > 8 else "]")
