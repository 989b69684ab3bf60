"""Gradients packed into a few flat tensors, so that a few all-reduces average all of them. Notebook 03 teaches it.

A bucket holds the gradients of one dtype, one after another, and behind them one flag per parameter:

    | gradient | gradient | ... | flag | flag | ... |

A flag is 1 where this rank has a gradient for that parameter. Summed with the rest, it tells every rank whether any
of them has, and costs no message of its own.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

FIRST_BUCKET_BYTES = 2**20  # small, so that the first all-reduce starts early (Li et al. 2020, section 4.2)


class Bucket:
    """Room for the gradients of `parameters`. After `fill`, their `.grad` are views of `flat`.

    flat [numel of all + one flag each]; began_s, ended_s: when its last all-reduce ran, time.monotonic().
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self.parameters = parameters
        sizes = [p.numel() for p in parameters]
        first = parameters[0]
        self.flat = torch.zeros(sum(sizes) + len(sizes), dtype=first.dtype, device=first.device)
        *parts, self.flags = self.flat.split([*sizes, len(sizes)])
        self.views = [part.view(p.shape) for part, p in zip(parts, parameters)]
        self.began_s = self.ended_s = 0.0
        self.reset()

    def reset(self) -> None:
        """Nothing is in the bucket."""
        self.filled = [False] * len(self.parameters)
        self.missing = len(self.parameters)

    def fill(self, slot: int, world_size: int) -> None:
        """Put the gradient of one parameter, divided by world_size, in its place; zeros and flag 0 if it has none.

        Divided first, because a sum over many ranks could leave the range of float16.
        """
        parameter, view = self.parameters[slot], self.views[slot]
        if parameter.grad is None:
            view.zero_()
            self.flags[slot] = 0
        else:
            if parameter.grad.is_sparse:
                raise RuntimeError(
                    "a sparse gradient cannot lie in a bucket: build the layer with sparse=False"
                )
            torch.div(parameter.grad, world_size, out=view)
            parameter.grad = view
            self.flags[slot] = 1
        self.filled[slot] = True
        self.missing -= 1

    def fill_rest(self, world_size: int) -> None:
        for slot, filled in enumerate(self.filled):
            if not filled:
                self.fill(slot, world_size)

    def hand_out(self) -> None:
        """After the all-reduce: a parameter has a gradient if some rank has one, as one process would."""
        for parameter, view, flag in zip(self.parameters, self.views, self.flags.tolist()):
            parameter.grad = view if flag > 0 else None
        self.reset()


def make_buckets(parameters: Iterable[nn.Parameter], bucket_bytes: float, first_bytes: float) -> list[Bucket]:
    """Buckets in the order in which they fill when gradients come in the order of `parameters`.

    A bucket is full once it holds `bucket_bytes`, the first of all `first_bytes` if that is less. Each dtype has
    buckets of its own.
    """
    open_ones: dict[torch.dtype, list[nn.Parameter]] = {}
    full: list[list[nn.Parameter]] = []
    for parameter in parameters:
        members = open_ones.pop(parameter.dtype, []) + [parameter]
        limit = bucket_bytes if full else min(first_bytes, bucket_bytes)
        if sum(p.nbytes for p in members) >= limit:
            full.append(members)
        else:
            open_ones[parameter.dtype] = (
                members  # popped and put back: the order is that of the last parameter
            )
    return [Bucket(members) for members in (*full, *open_ones.values())]


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that want a gradient, tied ones once, in the order of the module."""
    return [p for p in module.parameters() if p.requires_grad]


def tensors_in(output) -> list[Tensor]:
    """The tensors in what a forward returned: a tensor, or tensors in tuples, lists and dicts."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = output.values()
    elif not isinstance(output, (list, tuple)):
        return []
    return [tensor for part in output for tensor in tensors_in(part)]
