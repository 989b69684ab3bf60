"""What the checks of notebook 04 run on the ranks: one linear layer, and a watch on what a call leaves in memory.

n is the world size. Shape letters: B images in the batch of one rank, I inputs and O outputs of the layer. Its flat
parameters are the weight [O, I], then the bias [O].
"""

import gc
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from workshop_utils.checks import tensors_for_ranks
from workshop_utils.checks.watching import watched
from workshop_utils.collectives import ring_all_gather, ring_reduce_scatter


class Layer:
    """A linear layer on n ranks, and what is right on each: the same numbers wherever it is built."""

    SHAPES = ((4, 3, 2), (3, 5, 4), (2, 7, 1))  # B, I, O

    def __init__(self, case: int, n: int):
        B, I, O = self.SHAPES[case]
        self.out_features = O
        weight, bias = (
            tensors_for_ranks(2, (O, I), seed=case)[0],
            tensors_for_ranks(2, (O,), seed=10 + case)[1],
        )
        self.xs = tensors_for_ranks(n, (B, I), seed=20 + case)
        self.grad_ys = tensors_for_ranks(n, (B, O), seed=30 + case)
        self.outputs = [x @ weight.T + bias for x in self.xs]
        self.grad_xs = [grad_y @ weight for grad_y in self.grad_ys]
        self.shards = self._cut(weight, bias, n)
        self.own = [  # what each rank's own batch says, cut
            self._cut(grad_y.T @ x, grad_y.sum(0), n) for grad_y, x in zip(self.grad_ys, self.xs)
        ]
        self.sums = [sum(own[rank] for own in self.own) for rank in range(n)]
        self.grad_shards = [total / n for total in self.sums]

    def _cut(self, weight, bias, n):
        flat = torch.cat([weight.reshape(-1), bias])
        self.numel, self.size = flat.numel(), -(-flat.numel() // n)
        return [part.clone() for part in F.pad(flat, (0, n * self.size - self.numel)).view(n, -1)]

    def __str__(self):
        return f"{self.numel} parameters"


def on_rank_forward(answer) -> list[dict]:
    rank, n = dist.get_rank(), dist.get_world_size()
    seen = []
    for case in range(len(Layer.SHAPES)):
        layer = Layer(case, n)
        shard, x = layer.shards[rank].clone(), layer.xs[rank].clone()
        with _watching(n) as s:
            s["y"] = answer(x, shard, layer.out_features, s.pop("all_gather"))
        s["shard"] = shard
        seen.append(s)
    return seen


def on_rank_backward(answer) -> list[dict]:
    rank, n = dist.get_rank(), dist.get_world_size()
    seen = []
    for case in range(len(Layer.SHAPES)):
        layer = Layer(case, n)
        arguments = [t.clone() for t in (layer.grad_ys[rank], layer.xs[rank], layer.shards[rank])]
        with _watching(n) as s:
            s["returned"] = answer(*arguments, s.pop("all_gather"), s.pop("reduce_scatter"))
        if isinstance(s["returned"], (tuple, list)) and len(s["returned"]) == 2:
            s["grad_x"], s["grad_shard"] = s["returned"]
        seen.append(s)
    return seen


@contextmanager
def _watching(n: int):
    """What one call does: gathers, bytes sent, and the bytes that are left when its results are not counted.

    The storage of a result that is a view of something larger is left as well.
    """
    s = {"gathers": 0, "gathered_bytes": 0}
    whole = []

    def all_gather(output, input):
        s["gathers"] += 1
        s["gathered_bytes"] += output.nbytes
        whole.append(output)
        ring_all_gather(output, input)

    def reduce_scatter(output, input):
        ring_reduce_scatter(output, input)

    s |= {"all_gather": all_gather, "reduce_scatter": reduce_scatter}
    ring_reduce_scatter(torch.empty(1), torch.zeros(n))  # the ring keeps memory from its first call on
    with torch.no_grad(), watched() as sent, _NewStorages() as new:
        yield s
    s["sent_bytes"] = sum(num_bytes for _, num_bytes in sent)
    dist.barrier()  # nobody goes on while a message is under way
    s["whole_bytes"] = sum(t.untyped_storage().nbytes() for t in whole)
    whole.clear()
    results = [t for t in (s.get("y"), *_as_tuple(s.get("returned"))) if isinstance(t, torch.Tensor)]
    results_bytes = sum(t.nbytes for t in {t.data_ptr(): t for t in results}.values())
    s["left_bytes"] = new.left_alive(results_bytes)


def _as_tuple(value) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


# what would end the process if the storage is gone
_READING = {
    "linear",
    "matmul",
    "__matmul__",
    "__rmatmul__",
    "mm",
    "addmm",
    "einsum",
    "clone",
    "cat",
    "copy_",
    "contiguous",
}


class _NewStorages(TorchFunctionMode):
    """Notes the storage of every tensor that a call of torch returns inside."""

    def __init__(self):
        super().__init__()
        self.refs: dict[int, StorageWeakRef] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        tensors = list(_tensors([args, kwargs or {}]))
        given = {_id(t) for t in tensors}
        if function.__name__ in _READING and any(
            t.numel() and not t.untyped_storage().nbytes() for t in tensors
        ):
            raise RuntimeError(
                f"{function.__name__} reads a tensor whose storage has 0 bytes: it was freed too early"
            )
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if _id(tensor) not in given:
                self.refs[_id(tensor)] = StorageWeakRef(tensor.untyped_storage())
        return result

    def left_alive(self, expected_bytes: int) -> int:
        """Bytes alive beyond those expected. The watchdog of the ranks may hold a frame for a moment: look again."""
        for attempt in range(5):
            alive = [torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self.refs.values()]
            left = sum(storage.nbytes() for storage in alive if storage is not None) - expected_bytes
            del alive
            if left <= 0:
                return 0
            time.sleep(0.02)
            if attempt == 3:
                gc.collect()  # slow, and seldom needed
        return left


def _id(tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
