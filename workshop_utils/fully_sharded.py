"""Fully sharded data parallel by hand, ZeRO stage 3. Notebook 04 teaches it.

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 5.3;
Zhao et al. 2023, "PyTorch FSDP", section 3. Each rank keeps 1/n of the parameters, of their gradients and of the
optimizer's state. A *unit*, one layer or block, is whole only while it computes:

    forward    gather the unit (all-gather), compute, free it
    backward   gather it again, compute, free it, sum up its gradients (reduce-scatter): each rank keeps its part

Per step a rank sends 3 S (n-1)/n bytes, where S is the size of the padded parameters; data parallel sends 2. Under
compute_dtype the two gathers send `compute_dtype`, the reduce-scatter the parameters' own dtype.
"""

import weakref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves, tree_map_only

from workshop_utils.collectives import broadcast_
from workshop_utils.flat_shard import FlatShard, Use
from workshop_utils.ring_in_fsdp import use_ring_reduce_scatter

__all__ = ["FullyShardedDataParallel", "use_ring_reduce_scatter"]


class FullyShardedDataParallel(nn.Module):
    """Trains `module` with its parameters, gradients and optimizer state divided over the ranks.

        model = FullyShardedDataParallel(module)
        optimizer = torch.optim.Adam(model.parameters())     # the shards: one-dimensional, 1/n of the elements
        ...
        loss(model(inputs)).backward()
        model.finish_gradient_sync()
        optimizer.step()

    A unit is a module of one of `unit_types` (the outermost, where they are nested) with all its parameters. What no
    unit owns, and what two units share (tied weights), belongs to the root unit: the whole module. An
    nn.MultiheadAttention is always a unit, because it reads its out_proj's weight without calling out_proj. The
    gradient of a shard has its shape and dtype, and is the average over the ranks.

    compute_dtype: torch.bfloat16 or torch.float16: full parameters and the floats that enter a unit are cast to it;
        the output stays in it. Shards, the sum of the gradients, and the optimizer keep the parameters' dtype.
    reshard_after_forward: False keeps a unit whole from forward to backward: one gather less, more memory.

    Starts from rank 0's parameters and buffers. Every rank must use the same units in the same order. The loss of a
    rank is the mean over its own samples. Gradient clipping needs the norm over all ranks' shards.
    """

    holds_process_group = True

    def __init__(
        self,
        module: nn.Module,
        *,
        unit_types: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding),
        compute_dtype: torch.dtype | None = None,
        reshard_after_forward: bool = True,
    ):
        super().__init__()
        _check_arguments(unit_types, compute_dtype)
        self.module = module
        self.reshard_after_forward, self.compute_dtype = reshard_after_forward, compute_dtype
        for tensor in (*module.parameters(), *module.buffers()):
            broadcast_(tensor.detach())
        self._state_keys = list(module.state_dict())
        parameter_of = dict(module.named_parameters(remove_duplicate=False))
        self.units = [
            Unit(self, unit_module, uses)
            for unit_module, uses in _divide(module, (*unit_types, nn.MultiheadAttention)).items()
        ]
        self._flat_shards = [flat for unit in self.units for flat in unit.flat_shards]
        self.shards = nn.ParameterList(flat.shard for flat in self._flat_shards)
        position = {p: (flat, i) for u in self.units for flat, ps in u.members for i, p in enumerate(ps)}
        self._position = {key: position[parameter] for key, parameter in parameter_of.items()}
        self._finish_is_due = False
        _watch_optimizers(self)

    def forward(self, *args, **kwargs):
        """The module's forward."""
        return self.module(*args, **kwargs)

    def finish_gradient_sync(self) -> None:
        """Call between the last backward of a step and optimizer.step(): nothing full is left in memory after it."""
        self._finish_is_due = False
        self._start_over()

    def full_parameter_bytes(self) -> int:
        """Bytes of full parameters that this rank holds now, read from their storages."""
        return sum(flat.full.untyped_storage().nbytes() for flat in self._flat_shards)

    def full_state_dict(self) -> dict[str, Tensor]:
        """The plain module's state_dict, with new tensors, on every rank. Every rank must call it."""
        gathered = {flat: flat.gather_exactly() for flat in self._flat_shards}
        state = self.module.state_dict()  # the buffers: parameters were taken out
        for key in self._state_keys:
            if key in self._position:
                flat, i = self._position[key]
                state[key] = gathered[flat][i]
            state.move_to_end(key)
        return state

    def _start_over(self) -> None:
        """No unit is whole, none in backward; the next forward makes a new graph."""
        for unit in self.units:
            unit.free()
            for flat in unit.flat_shards:
                flat.forget_forward()


class Unit:
    """A module whose parameters are gathered and freed together, by hooks before and after forward and backward."""

    def __init__(
        self, model: FullyShardedDataParallel, module: nn.Module, uses: dict[nn.Parameter, list[Use]]
    ):
        self.model, self.is_root, self.in_backward = model, module is model.module, False
        kinds: dict[tuple, dict] = {}
        for parameter, uses_of_one in uses.items():
            kinds.setdefault((parameter.dtype, parameter.requires_grad), {})[parameter] = uses_of_one
        self.members = [
            (FlatShard(kind, model.compute_dtype, dist.group.WORLD), list(kind)) for kind in kinds.values()
        ]
        self.flat_shards = [flat for flat, _ in self.members]
        module.register_forward_pre_hook(self.before_forward, with_kwargs=True, prepend=True)
        module.register_forward_hook(self.after_forward, always_call=True)  # after an exception too

    def before_forward(self, module, args, kwargs):
        """Gather, and cast the inputs. A forward inside a backward is activation checkpointing's second one."""
        if self.is_root and not _backward_is_running():
            self.model._start_over()
        self.gather()
        dtype = self.model.compute_dtype
        if dtype is None:
            return None
        return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs))

    def after_forward(self, module, args, output) -> None:
        """Free, unless backward needs it at once; have every output call `before_backward`."""
        if torch.is_grad_enabled():
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(self.before_backward)
        keep = self.in_backward or (torch.is_grad_enabled() and not self.model.reshard_after_forward)
        if not keep:
            self.free()

    def before_backward(self, gradient: Tensor) -> None:
        """The gradient of an output is there: this unit's backward comes next, the one before has ended."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "FullyShardedDataParallel cannot differentiate twice: leave out create_graph=True"
            )
        self.model._finish_is_due = True
        for other in self.model.units if not self.is_root else ():
            if other is not self and other.in_backward and not other.is_root:
                other.free()
        self.in_backward = True
        self.gather()

    def gather(self) -> None:
        for flat in self.flat_shards:
            flat.gather()

    def free(self) -> None:
        self.in_backward = False
        for flat in self.flat_shards:
            flat.free()


def _divide(root: nn.Module, unit_types) -> dict[nn.Module, dict[nn.Parameter, list[Use]]]:
    """Each unit's parameters with their uses. A parameter that two units use is the root's."""
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    uses: dict[nn.Parameter, list[Use]] = {}

    def walk(module: nn.Module, unit: nn.Module | None) -> None:
        if unit is None and isinstance(module, unit_types):
            unit = module
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, set()).add(unit or root)
                if (module, name) not in uses.setdefault(parameter, []):
                    uses[parameter].append((module, name))
        for child in module.children():
            walk(child, unit)

    walk(root, None)
    units: dict[nn.Module, dict[nn.Parameter, list[Use]]] = {root: {}}
    for parameter, found in owners.items():
        owner = found.pop() if len(found) == 1 else root
        units.setdefault(owner, {})[parameter] = uses[parameter]
    return units


def _backward_is_running() -> bool:
    return torch._C._current_graph_task_id() != -1


def _watch_optimizers(model: FullyShardedDataParallel) -> None:
    """Make optimizer.step() on the model's shards an error while finish_gradient_sync() is due."""
    watched = weakref.ref(model)

    def before_step(optimizer, args, kwargs) -> None:
        model = watched()
        if model is None or not model._finish_is_due:
            return
        mine = set(model.shards)
        if any(p in mine for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError("call finish_gradient_sync() after backward and before optimizer.step()")

    handle = register_optimizer_step_pre_hook(before_step)
    weakref.finalize(model, handle.remove)


def _check_arguments(unit_types, compute_dtype) -> None:
    if not dist.is_initialized():
        raise RuntimeError("FullyShardedDataParallel needs a process group: create it inside a rank")
    if not all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in unit_types):
        raise ValueError(f"unit_types must be module classes, such as (nn.Linear,), got {unit_types!r}")
    if compute_dtype is not None and not compute_dtype.is_floating_point:
        raise ValueError(f"compute_dtype must be a float dtype, such as torch.bfloat16, got {compute_dtype}")
