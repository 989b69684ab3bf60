"""PEFT's conventions: which modules `target_modules` means, and the two files of a LoRA adapter. Notebook 05, lora.py.

    adapter_config.json         r, lora_alpha, target_modules, ...
    adapter_model.safetensors   base_model.model.<path>.lora_A.weight [r, in] and .lora_B.weight [out, r]

Written so that PEFT 0.18 to 0.21 reads them; of what PEFT writes, plain LoRA on nn.Linear is read, and every setting
that changes the computation in a way that LoRALinear does not know is refused by name.
"""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_KEY_PREFIX = "base_model.model."
_LISTED = 12  # an error names at most so many modules

# PEFT's defaults of what LoRALinear knows
_SETTINGS = {"target_modules": None, "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False}
# What says where an adapter comes from, or matters only beside a setting that is refused
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}
# The values that switch a setting off: of these two, and of all others
_OFF = {"bias": ["none"], "init_lora_weights": [True, False, "gaussian"]}
_OFF_ELSEWHERE = [None, False, {}, []]


def target_module_names(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    """The paths of the nn.Linear modules that `target_modules` means, by PEFT's rule, in the model's order.

    A list holds names: a whole path ("layers.1.fc"), or its end ("fc"). A string is a regular expression for the whole
    path, except "all-linear": all but the output layer of a transformers language model. One thing is stricter than
    PEFT: every name of a list must match something.
    Raises ValueError, naming what there is, where a name matches nothing, or something that is no nn.Linear, or a
    module that stands in two places.
    """
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if name and _takes_lora(module)]
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        output_layer = getattr(model, "get_output_embeddings", lambda: None)()
        found = {target_modules: [name for name in linear if modules[name] is not output_layer]}
    elif isinstance(target_modules, str):
        found = {target_modules: [name for name in modules if _fullmatch(target_modules, name)]}
    else:
        found = {t: [name for name in modules if name == t or name.endswith(f".{t}")] for t in target_modules}
    there_are = f"The nn.Linear modules of {type(model).__name__}: {shortened(linear) or 'none'}."
    for target, matched in (found or {"": []}).items():
        if not matched:
            raise ValueError(f"{target!r} matches no module. {there_are}")
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    chosen = set().union(*found.values())
    names = [name for name in modules if name in chosen]
    for name in names:
        if not _takes_lora(modules[name]):
            raise ValueError(f"{name!r} is {_kind(modules[name])}. LoRA needs nn.Linear. {there_are}")
        if places[id(modules[name])] > 1:
            raise ValueError(
                f"{name!r} stands in {places[id(modules[name])]} places: LoRA would reach one of them"
            )
    return names


def as_target_modules(model: nn.Module, names: Sequence[str]) -> list[str] | str:
    """What to save as `target_modules` so that exactly the modules `names` (whole paths) are matched again."""
    endings = tuple(f".{name}" for name in names)
    others = [name for name, _ in model.named_modules() if name not in names and name.endswith(endings)]
    return "|".join(re.escape(name) for name in names) if others else list(names)


def write_adapter(
    folder: Path,
    settings: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    *,
    base_model_name_or_path: str | None,
    model: nn.Module,
) -> None:
    """Write both files. `settings` holds r, lora_alpha, target_modules, ...; `tensors` has the paths of the model.

    What is in the folder stays until both new files are complete. The configuration goes first and comes last, so
    that whatever interrupts this leaves the old adapter, the new one, or one that every reader refuses.
    """
    config = {
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "base_model_name_or_path": base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "peft_type": "LORA",
        "revision": None,
        "task_type": None,
        "use_dora": False,
        **settings,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as unfinished:
        new_config, new_weights = Path(unfinished, CONFIG_FILE), Path(unfinished, WEIGHTS_FILE)
        new_config.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        named = {_KEY_PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(named, new_weights, metadata={"format": "pt"})
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        new_weights.replace(folder / WEIGHTS_FILE)
        new_config.replace(folder / CONFIG_FILE)


def read_adapter(folder: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    """(settings, tensors): what apply_lora takes as keywords, and {path.lora_A.weight: tensor, ...}, on the CPU.

    Raises FileNotFoundError for a missing file and ValueError for a damaged one, or for a setting that is not
    supported, which it names.
    """
    config = _read_config(folder / CONFIG_FILE)
    settings = {name: config.get(name, default) for name, default in _SETTINGS.items()}
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        pickled = (
            " (adapter_model.bin is a pickle: save it as safetensors)"
            * (folder / "adapter_model.bin").exists()
        )
        raise FileNotFoundError(f"no {WEIGHTS_FILE} in {folder}{pickled}")
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights} cannot be read, it is damaged or incomplete: {error}") from None
    foreign = sorted(key for key in tensors if not key.startswith(_KEY_PREFIX))
    if foreign:
        raise ValueError(f"{weights} holds keys that do not begin with {_KEY_PREFIX}: {shortened(foreign)}")
    return settings, {key.removeprefix(_KEY_PREFIX): tensor for key, tensor in tensors.items()}


def shortened(names: Sequence[str]) -> str:
    """The names with commas; of a long list the beginning and the count."""
    rest = f", ... ({len(names)} in all)" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest


def _read_config(path: Path) -> dict:
    """The configuration, refused by name where it asks for more than plain LoRA."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no {CONFIG_FILE} in {path.parent}: this is no adapter, or saving it was cut off"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged or incomplete: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{path} does not describe LoRA: its peft_type must be LORA")
    if not config.get("target_modules"):
        raise ValueError(f"{path} has no target_modules: there is nothing to apply LoRA to")
    for name, value in config.items():
        off = _OFF.get(name, _OFF_ELSEWHERE)
        known = name in _SETTINGS or name in _WITHOUT_EFFECT
        if not known and not any(type(value) is type(other) and value == other for other in off):
            raise ValueError(
                f"{path}: {name} = {value!r} is not supported here. Load this adapter with peft."
            )
    return config


def _takes_lora(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _kind(module: nn.Module) -> str:
    """What a module is that takes no LoRA."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "the output of torch's MultiheadAttention, which reads its weight and never calls it"
    return f"a {type(module).__name__}"


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"target_modules {pattern!r} is no regular expression: {error}") from None
