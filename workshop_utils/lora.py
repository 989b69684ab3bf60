"""LoRA: a frozen linear layer beside a trainable product of two thin matrices. Taught in notebook 05.

    y = W x + bias + scaling * B A x        scaling = lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA)

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), section 4.1; rsLoRA:
Kalajdzievski 2023 (arXiv:2312.03732). The names (r, lora_alpha, lora_A, lora_B, base_layer) are those of the library
PEFT; peft_format.py knows its files and its rule for target_modules.

Shapes: W is [out, in], A is [r, in], B is [out, r]. `r` is LoRA's rank; in the other notebooks `rank` is a process.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from workshop_utils.peft_format import (
    as_target_modules,
    read_adapter,
    shortened,
    target_module_names,
    write_adapter,
)


class LoRALinear(nn.Module):
    """`base_layer`, frozen, plus scaling * B A x. B starts at 0, so at first nothing changes.

    The adapter has the dtype and the device of the base's weight. `lora_dropout` is applied to the x that A reads,
    never to the base's. While merged, the forward is the base's alone and the adapter gets no gradient.
    Raises TypeError where base_layer is no nn.Linear, ValueError for r < 1, lora_alpha <= 0 or a lora_dropout
    outside [0, 1).
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        *,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
    ):
        super().__init__()
        _check_settings(r, lora_alpha, lora_dropout)
        if not isinstance(base_layer, nn.Linear):
            raise TypeError(f"base_layer must be an nn.Linear, got {type(base_layer).__name__}")
        weight = base_layer.weight
        self.base_layer = base_layer.requires_grad_(False)
        like_base = {"bias": False, "device": weight.device, "dtype": weight.dtype}
        self.lora_A = nn.Linear(base_layer.in_features, r, **like_base)
        self.lora_B = nn.Linear(r, base_layer.out_features, **like_base)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # as loralib and PEFT do
        nn.init.zeros_(self.lora_B.weight)
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.scaling = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
        self.merged = False
        self.register_buffer("weight_before_merge", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        if self.merged:
            return self.base_layer(x)
        # scaling meets the r numbers between A and B: the same product as scaling the out numbers after B
        return self.base_layer(x) + self.lora_B(self.lora_A(self.lora_dropout(x)) * self.scaling)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """scaling * B A, [out, in]: what merging adds to W. In float32 at least."""
        at_least_float32 = torch.promote_types(self.lora_A.weight.dtype, torch.float32)
        B, A = (layer.weight.to(at_least_float32) for layer in (self.lora_B, self.lora_A))
        return (B @ A) * self.scaling

    @torch.no_grad()
    def merge(self, keep_copy: bool = False) -> None:
        """Add scaling * B A to W in place: from now on the layer costs what the base alone costs.

        `keep_copy` keeps W as the buffer `weight_before_merge` (out * in elements), and unmerge is then bit-exact.
        Without it W + D - D differs from W in the last bits. Cycles with one and the same adapter add nothing to the
        first one's difference; with adapters that take turns it grows from cycle to cycle.
        Raises RuntimeError where the layer is merged already.
        """
        if self.merged:
            raise RuntimeError(
                "already merged: merging twice would add the adapter twice. Call unmerge() first."
            )
        if keep_copy:
            self.weight_before_merge = self.base_layer.weight.detach().clone()
        self.base_layer.weight += self.delta_weight()
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo merge(): put the kept copy of W back, or subtract scaling * B A. RuntimeError where nothing is merged."""
        if not self.merged:
            raise RuntimeError("not merged: there is nothing to undo")
        if self.weight_before_merge is not None:
            self.base_layer.weight.copy_(self.weight_before_merge)
            self.weight_before_merge = None
        else:
            self.base_layer.weight -= self.delta_weight()
        self.merged = False

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, scaling={self.scaling:g}, merged={self.merged}"


def apply_lora(
    model: nn.Module,
    target_modules: str | Sequence[str],
    r: int,
    lora_alpha: float,
    *,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
) -> nn.Module:
    """Replace nn.Linear modules of `model` by LoRALinear, in place, and freeze everything else. Returns `model`.

    `target_modules` means what it means in PEFT: a list of names, each a whole path ("layers.1.fc") or its end
    ("fc"); or one string, a regular expression for the whole path; or "all-linear", which leaves out the output
    layer of a transformers language model.
    Raises ValueError, before anything is changed, where a name matches nothing, where a match is no nn.Linear, where
    the model holds LoRA layers already, and for the settings that LoRALinear refuses.
    """
    _check_settings(r, lora_alpha, lora_dropout)
    _check_no_lora(model)
    names = target_module_names(model, target_modules)
    model.requires_grad_(False)
    for name in names:
        layer = LoRALinear(
            model.get_submodule(name), r, lora_alpha, lora_dropout=lora_dropout, use_rslora=use_rslora
        )
        layer.train(layer.base_layer.training)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return model


def merge_lora(model: nn.Module, keep_copy: bool = False) -> None:
    """Merge every LoRA layer into its base weight, in place: `LoRALinear.merge` says what `keep_copy` costs."""
    for _, layer in _layers_to_change(model, merged=False):
        layer.merge(keep_copy)


def unmerge_lora(model: nn.Module) -> None:
    """Unmerge every LoRA layer of the model, in place."""
    for _, layer in _layers_to_change(model, merged=True):
        layer.unmerge()


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """A and B of every LoRA layer: what an optimizer gets."""
    for _, layer in lora_layers(model):
        yield layer.lora_A.weight
        yield layer.lora_B.weight


def lora_layers(model: nn.Module) -> list[tuple[str, LoRALinear]]:
    """(path, layer) of every LoRA layer in the model; ValueError where there is none."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no LoRA layers: call apply_lora first")
    return layers


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """{path.lora_A.weight: [r, in], path.lora_B.weight: [out, r]}: the adapter without the base, as copies."""
    return {name: tensor.detach().clone() for name, tensor in _adapter_tensors(model).items()}


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what `adapter_state_dict` gave into the model: this is how adapters on one base are switched.

    The values are cast to the dtype of the model's adapter. Scaling and dropout stay as they are.
    Raises RuntimeError while the adapter is merged, and ValueError, naming them, for keys that are missing or too
    many and for other shapes; then nothing has been changed.
    """
    for name, layer in lora_layers(model):
        if layer.merged:
            raise RuntimeError(
                f"{name} is merged: unmerge_lora(model) first, or W keeps the adapter that it holds"
            )
    own = _adapter_tensors(model)
    check_adapter_shapes({name: tuple(tensor.shape) for name, tensor in own.items()}, state)
    for name, tensor in own.items():
        tensor.copy_(state[name])


def check_adapter_shapes(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> None:
    """ValueError where `state` has other keys or other shapes than `expected`."""
    for problem, keys in (
        ("is missing from", expected.keys() - state.keys()),
        ("is too many in", state.keys() - expected.keys()),
    ):
        if keys:
            raise ValueError(
                f"{shortened(sorted(keys))} {problem} the adapter: it was made for another model"
            )
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"{name} is {list(state[name].shape)} in the adapter, the model needs {list(shape)}"
            )


def save_peft_adapter(model: nn.Module, folder: str | Path, *, base_model_name_or_path: str | None) -> None:
    """Write the adapter into `folder` as PEFT would: adapter_config.json and adapter_model.safetensors.

    `base_model_name_or_path` tells people, and PEFT, which base it belongs to: a repository id, a path or None.
    The factors A and B are written, merged or not. An adapter that was in the folder is replaced, never mixed with.
    Raises ValueError where the model is a lone layer, or its layers differ in r, lora_alpha, lora_dropout or use_rslora.
    """
    layers = lora_layers(model)
    if not layers[0][0]:
        raise ValueError(
            "the model is one LoRA layer and nothing around it: an adapter needs the layer's name in a model"
        )
    settings = _settings(layers[0][1])
    for name, layer in layers:
        for setting, value in _settings(layer).items():
            if value != settings[setting]:
                raise ValueError(
                    f"{setting} is {settings[setting]} in {layers[0][0]} and {value} in {name}: "
                    "a saved adapter has one value for all layers"
                )
    names = [name for name, _ in layers]
    write_adapter(
        Path(folder),
        {**settings, "target_modules": as_target_modules(model, names)},
        adapter_state_dict(model),
        base_model_name_or_path=base_model_name_or_path,
        model=model,
    )


def load_peft_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Apply LoRA to `model` as adapter_config.json says, in place, with the saved A and B. Returns `model`.

    The values are cast to the dtype of the base's weights; A and B are trainable, everything else is frozen.
    Raises FileNotFoundError or ValueError, before anything is changed, where a file is missing or damaged, a setting
    is not supported (use_dora, bias, modules_to_save, ...: the message names it), or keys or shapes do not fit.
    """
    _check_no_lora(model)
    settings, tensors = read_adapter(Path(folder))
    expected = {}
    for name in target_module_names(model, settings["target_modules"]):
        linear = model.get_submodule(name)
        expected[f"{name}.lora_A.weight"] = (settings["r"], linear.in_features)
        expected[f"{name}.lora_B.weight"] = (linear.out_features, settings["r"])
    check_adapter_shapes(expected, tensors)
    apply_lora(model, **settings)
    load_adapter_state_dict(model, tensors)
    return model


def subspace_similarity(first: Tensor, second: Tensor, i: int, j: int) -> float:
    """How much of the span of the top i right singular vectors of `first` lies in that of the top j of `second`.

    first [m, n] and second [k, n], for instance A of two adapters. 0: orthogonal; 1: the smaller span is contained in
    the larger. phi = ||U_i^T V_j||_F^2 / min(i, j), Hu et al. 2021, section 7.2, equation 4.
    Raises ValueError where i or j is not between 1 and the number of singular vectors.
    """
    bases = []
    for name, matrix, count in (("i", first, i), ("j", second, j)):
        if not 1 <= count <= min(matrix.shape):
            raise ValueError(f"{name} must be 1 to {min(matrix.shape)}, got {count}")
        at_least_float32 = torch.promote_types(matrix.dtype, torch.float32)
        bases.append(torch.linalg.svd(matrix.detach().to(at_least_float32), full_matrices=False).Vh[:count])
    return float((bases[0] @ bases[1].T).square().sum() / min(i, j))


def _check_no_lora(model: nn.Module) -> None:
    wrapped = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    if wrapped:
        raise ValueError(
            f"{type(model).__name__} holds LoRA layers already: {shortened(wrapped)}. Start from the base, or switch "
            "adapters with load_adapter_state_dict."
        )


def _layers_to_change(model: nn.Module, merged: bool) -> list[tuple[str, LoRALinear]]:
    """All LoRA layers; RuntimeError, before any is changed, where one is not in the state `merged`, or is tied."""
    layers = lora_layers(model)
    for name, layer in layers:
        if layer.merged is not merged:
            raise RuntimeError(f"{name} is {'merged already' if layer.merged else 'not merged'}")
    uses = {id(layer.base_layer.weight): f"{name}.base_layer.weight" for name, layer in layers}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if uses.get(id(parameter), name) != name:
            raise RuntimeError(f"{uses[id(parameter)]} is tied to {name}: merging would change that too")
    return layers


def _adapter_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{name}.lora_{letter}.weight".removeprefix("."): getattr(layer, f"lora_{letter}").weight
        for name, layer in lora_layers(model)
        for letter in "AB"
    }


def _settings(layer: LoRALinear) -> dict[str, object]:
    return {
        "r": layer.r,
        "lora_alpha": layer.lora_alpha,
        "lora_dropout": getattr(layer.lora_dropout, "p", 0.0),
        "use_rslora": layer.use_rslora,
    }


def _check_settings(r: int, lora_alpha: float, lora_dropout: float) -> None:
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"r must be a whole number, 1 or more, got {r!r}")
    if not lora_alpha > 0:
        raise ValueError(f"lora_alpha must be above 0, got {lora_alpha!r}")
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout must be at least 0 and below 1, got {lora_dropout!r}")
