"""A second device on any machine: torch's "lazy" one, whose TorchScript backend computes for real, on the CPU.

What mixes its tensors with the CPU's raises, and so does `.numpy()`, as with CUDA. So code that passes here has its
tensors in the right place. Kernels, precision and speed of a GPU it does not test: tests/gpu does.
"""

import functools

import torch

DEVICE = "lazy"


@functools.cache
def start() -> torch.library.Library:
    """Make DEVICE usable in this process. What torch's own device lacks is added: lists of views come back as tensors
    of the CPU there, under the name of the device."""
    import torch._lazy.ts_backend

    torch._lazy.ts_backend.init()
    slice_of, select = torch.ops.aten.slice_copy, torch.ops.aten.select_copy

    def cut(x, sizes, dim=0):
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return [slice_of(x, dim, end - size, end) for size, end in zip(sizes, ends)]

    def split(x, size, dim=0):
        return [slice_of(x, dim, start, start + size) for start in range(0, max(x.shape[dim], 1), size)]

    def unbind(x, dim=0):
        return [select(x, dim, i) for i in range(x.shape[dim])]

    library = torch.library.Library("aten", "IMPL")
    library.impl("split_copy.Tensor", split, DEVICE.capitalize())
    library.impl("split_with_sizes_copy", cut, DEVICE.capitalize())
    library.impl("unbind_copy.int", unbind, DEVICE.capitalize())
    return library
