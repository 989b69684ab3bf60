"""What can be moved with the mouse or the keyboard: two widgets in notebook 02, one in each from 03 to 08.

A widget draws nothing itself: it calls a plot function that is tested alone, and that also gives the static figure for
GitHub and paper. Works with ipywidgets 7.7 and 8. Each is loaded on first use: 02 needs nothing of 08's.
"""

import importlib

_HOME = {
    "all_reduce_stepper": "all_reduce",
    "alpha_beta": "all_reduce",
    "bucket_timeline": "data_parallel",
    "memory_bill": "fully_sharded",
    "lora_rank": "lora",
    "intrinsic_dimension": "subspace",
    "quantization_explorer": "quantization",
    "planner": "fsdp_qlora",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'workshop_utils.widgets' has no attribute {name!r}")
    return getattr(importlib.import_module(f"workshop_utils.widgets.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
