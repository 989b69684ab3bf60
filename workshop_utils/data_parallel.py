"""Data parallelism by hand: N replicas that train as one process would on the whole batch. Notebook 03 teaches it.

    model = DataParallel(net)                  # all ranks start from rank 0's weights
    loss_of(model(images), labels).backward()  # all-reduces start while backward still runs
    model.finish_gradient_sync()               # every .grad is now the average over the ranks
    optimizer.step()

Everything is sent by workshop_utils.collectives and ring, over the default process group, from CPU memory.
After Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training" (VLDB 2020).

    n   world_size       S   bytes of all gradients of one replica
"""

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from workshop_utils.agreement import check_same, describe_module
from workshop_utils.background import Background
from workshop_utils.collectives import broadcast_, ring_all_reduce_
from workshop_utils.gradient_buckets import (
    FIRST_BUCKET_BYTES,
    Bucket,
    make_buckets,
    tensors_in,
    trainable,
)
from workshop_utils.pieces import flat_view
from workshop_utils.sharded_optimizer import ShardedOptimizer

__all__ = [
    "DataParallel",
    "ShardedOptimizer",
    "all_reduce_gradients",
    "broadcast_parameters",
    "shard_indices",
]

PACK_BYTES = 4 * 2**20  # tensors are broadcast together up to this size
_hooks = WeakTensorKeyDictionary()  # of each wrapped parameter, the one hook in use


def broadcast_parameters(module: nn.Module, src: int = 0) -> None:
    """Overwrite all parameters and buffers of `module`, of any dtype, on every rank with those of rank `src`.

    Every rank calls it. ValueError, on all ranks, naming rank and parameter, if the modules differ in shape.
    """
    check_same(describe_module(module))
    _broadcast_all([*module.parameters(), *module.buffers()], src)


@torch.no_grad()
def all_reduce_gradients(module: nn.Module) -> None:
    """Replace every gradient by its average over the ranks. Call it between backward and the optimizer's step.

    A tied parameter counts once, a frozen one not at all. A rank without a gradient for a parameter counts as
    zero; where no rank has one, it stays None. A rank sends 2(n-1)/n S, plus one number for each parameter. The
    gradients are views of a few flat tensors afterwards.
    """
    n = dist.get_world_size()
    for bucket in make_buckets(trainable(module), float("inf"), float("inf")):
        bucket.fill_rest(n)
        ring_all_reduce_(bucket.flat)
        bucket.hand_out()


class DataParallel(nn.Module):
    """Wraps a module so that its gradients are averaged over the ranks, in buckets, while backward still runs.

    bucket_bytes  a bucket is sent once it holds at least this much, and all buckets before it have been
    overlap       False: everything is sent in finish_gradient_sync, by the calling thread

    Each step: forward, backward, `finish_gradient_sync()`, optimizer.step(). Until it has returned, gradients are
    under way: leave them alone, and start no collective of your own on the default group. Uneven batches: the mean of
    the ranks' means is not the mean over all samples; weight each rank's mean loss by
    local_n * world_size / global_n.

    Buffers (the running means of BatchNorm) become rank 0's in finish_gradient_sync. So every forward in training
    starts from rank 0's, as in torch's DistributedDataParallel, and so does an evaluation on any rank.

    Raises ValueError on all ranks if they wrap different modules. Parameters are rank 0's from here on.
    """

    holds_process_group = True  # ranks that had to leave their group name such objects: build them again

    def __init__(self, module: nn.Module, *, bucket_bytes: int = 25 * 2**20, overlap: bool = True):
        super().__init__()
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes must be 1 or more, got {bucket_bytes}")
        if elsewhere := [name for name, p in module.named_parameters() if p.device.type != "cpu"]:
            raise ValueError(
                f"parameter {elsewhere[0]!r} is not in CPU memory, from which gloo sends: on GPUs use "
                "torch.nn.parallel.DistributedDataParallel with the backend nccl"
            )
        self.module, self.overlap = module, overlap
        check_same([*describe_module(module), f"bucket_bytes={bucket_bytes}"])
        _broadcast_all([*module.parameters(), *module.buffers()], 0)
        self._group, self._world_size = dist.group.WORLD, dist.get_world_size()
        self._frozen = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
        # Backward meets the last layer first, so its gradients fill the first bucket.
        self._buckets = make_buckets(reversed(trainable(module)), bucket_bytes, FIRST_BUCKET_BYTES)
        self._background = Background() if overlap and self._world_size > 1 else None
        self._sync, self._step = True, _Step()
        self._listen()

    def _listen(self) -> None:
        """Hooks hold this object weakly: when it goes, they go.

        A module that is wrapped again must not keep the hooks of the earlier wrapper, which may live on, for instance
        in the traceback of a cell that failed.
        """
        me, handles = weakref.WeakMethod(self._on_gradient), []
        for bucket in self._buckets:
            for slot, parameter in enumerate(bucket.parameters):
                if parameter in _hooks:
                    _hooks[parameter].remove()
                hook = partial(_call_if_alive, me, bucket, slot)
                _hooks[parameter] = parameter.register_post_accumulate_grad_hook(hook)
                handles.append(_hooks[parameter])
        weakref.finalize(self, _let_go, handles, self._background)

    def forward(self, *args, **kwargs):
        """The module's own forward, on this rank's part of the batch."""
        if not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        self._check_before_forward()
        if self._step.finished:
            self._step = _Step()
        step, began_s = self._step, time.monotonic()
        output = self.module(*args, **kwargs)
        step.forwards.append((began_s, time.monotonic()))
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(step.on_backward_begins)
        return output

    def finish_gradient_sync(self) -> None:
        """Wait until every `.grad` is the average over the ranks. Every rank calls it after its backward.

        A rank that had no batch may call it alone: it counts as zero. Inside no_sync it does nothing. If
        communication failed, raises what the communicating thread raised, with that thread's traceback.
        """
        if not self._sync:
            return
        step, began_s = self._step, time.monotonic()
        step.check_not_broken()
        if step.finished:
            step = self._step = _Step()
        step.broken = True  # until all went well
        with torch.no_grad():
            for bucket in self._buckets[step.launched :]:
                bucket.fill_rest(self._world_size)
                self._launch(bucket)
            for _ in range(step.in_background):
                self._background.wait()
            for bucket in self._buckets:
                bucket.hand_out()
        _broadcast_all(list(self.module.buffers()), 0, self._group)
        step.broken, step.finished, step.waited = False, True, (began_s, time.monotonic())

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, gradients only add up on this rank; the next backward outside averages what has gathered.

        Divide each micro-batch's loss by their number, as one process would.
        """
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    @property
    def timeline(self) -> list[tuple[str, float, float]]:
        """(label, began_s, ended_s) of this rank's last step, in seconds since its forward began, as measured.

        Labels: forward, backward (to the last gradient), one pair for each micro-batch; "bucket 0" and so on, the
        all-reduce of each bucket; wait, the time spent in finish_gradient_sync.
        """
        step = self._step
        spans = [("forward", *span) for span in step.forwards] + [("backward", *b) for b in step.backwards]
        if step.finished:
            spans += [(f"bucket {i}", b.began_s, b.ended_s) for i, b in enumerate(self._buckets)]
            spans.append(("wait", *step.waited))
        zero_s = min((began_s for _, began_s, _ in spans), default=0.0)
        return [(label, began_s - zero_s, ended_s - zero_s) for label, began_s, ended_s in spans]

    # -- while backward runs

    def _on_gradient(self, bucket: Bucket, slot: int, parameter: nn.Parameter) -> None:
        """This parameter's gradient is complete. The hook gets the parameter, not the gradient."""
        if self._sync and self._buckets:
            if bucket.filled[slot]:
                raise RuntimeError(
                    "a second backward before finish_gradient_sync(): call it after each backward, or run all but "
                    "the last inside `with model.no_sync():`"
                )
            self._step.pending = True
            if self.overlap:
                with torch.no_grad():
                    bucket.fill(slot, self._world_size)
                self._launch_ready()
        self._step.on_gradient()

    def _launch_ready(self) -> None:
        """In the order of the buckets on every rank, whatever order the gradients came in."""
        step = self._step
        while step.launched < len(self._buckets) and self._buckets[step.launched].missing == 0:
            self._launch(self._buckets[step.launched])

    def _launch(self, bucket: Bucket) -> None:
        self._step.launched += 1
        if self._background is None:
            _all_reduce(bucket, self._group)
        else:
            self._step.in_background += 1
            self._background.start(partial(_all_reduce, bucket, self._group))

    def _check_before_forward(self) -> None:
        self._step.check_not_broken()
        if self._sync and self._step.pending and not self._step.finished:
            raise RuntimeError(
                "finish_gradient_sync() was not called after the last backward: without it, the optimizer steps on "
                "gradients that are not averaged yet. Call it after each backward, before optimizer.step(). If a "
                "mistake cut the last step short, wrap the module again on all ranks."
            )
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise RuntimeError(
                    f"parameter {name!r} was frozen when DataParallel was built, so nobody would average its "
                    "gradient: wrap the module again after changing requires_grad"
                )


class _Step:
    """What happened since the first forward of the step under way. Times of time.monotonic()."""

    def __init__(self):
        self.forwards: list[tuple[float, float]] = []
        self.backwards: list[list[float]] = []
        self.waited = (0.0, 0.0)
        self.launched = self.in_background = 0  # buckets
        self.pending = self.finished = self.broken = False

    def check_not_broken(self) -> None:
        if self.broken:
            raise RuntimeError(
                "an earlier step failed while gradients were under way: wrap the module again, DataParallel(net)"
            )

    def on_backward_begins(self, _gradient: Tensor) -> None:
        if len(self.backwards) < len(self.forwards):
            self.backwards.append([time.monotonic()] * 2)

    def on_gradient(self) -> None:
        if self.backwards:
            self.backwards[-1][1] = time.monotonic()


def _all_reduce(bucket: Bucket, group: dist.ProcessGroup) -> None:
    bucket.began_s = time.monotonic()
    ring_all_reduce_(bucket.flat, group)
    bucket.ended_s = time.monotonic()


def _call_if_alive(method: weakref.WeakMethod, *args) -> None:
    if (alive := method()) is not None:
        alive(*args)


def _let_go(handles: list, background: Background | None) -> None:
    for handle in handles:
        handle.remove()
    if background is not None:
        background.end()


@torch.no_grad()
def _broadcast_all(tensors: list[Tensor], src: int, group: dist.ProcessGroup | None = None) -> None:
    """Many small tensors travel as one message, as bytes, whatever their dtypes."""
    pack: list[Tensor] = []
    for tensor in tensors:
        pack.append(tensor)
        if sum(t.nbytes for t in pack) >= PACK_BYTES:
            _broadcast_together(pack, src, group)
            pack = []
    if pack:
        _broadcast_together(pack, src, group)


def _broadcast_together(tensors: list[Tensor], src: int, group: dist.ProcessGroup | None) -> None:
    packed = torch.cat([t.detach().contiguous().view(-1).view(torch.uint8) for t in tensors])
    broadcast_(packed, src, group)
    for tensor, part in zip(tensors, packed.split([t.nbytes for t in tensors])):
        with flat_view(tensor) as flat:
            flat.view(torch.uint8).copy_(part)


def shard_indices(
    num_samples: int, rank: int, world_size: int, *, epoch: int = 0, seed: int = 0, drop_last: bool = False
) -> Tensor:
    """Which samples of the data set this rank gets in this epoch: int64 [ceil(num_samples / world_size)].

    A permutation that all ranks draw alike from seed + epoch, dealt out like cards. So that all ranks get equally
    many, the first few samples are dealt a second time at the end; with drop_last, the last few to nobody.
    Index by index what torch's DistributedSampler with shuffle=True gives.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank must lie between 0 and world_size - 1, got rank {rank} of {world_size}")
    if num_samples < 1 or (drop_last and num_samples < world_size):
        raise ValueError(
            f"{num_samples} samples do not give each of {world_size} ranks one"
            + (": drop_last=False repeats some" if num_samples > 0 else "")
        )
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed + epoch))
    per_rank = num_samples // world_size if drop_last else -(-num_samples // world_size)
    total = per_rank * world_size
    return order.repeat(-(-total // num_samples))[:total][rank::world_size]
