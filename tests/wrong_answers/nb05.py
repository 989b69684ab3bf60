"""Notebook 05: wrong answers and the complaint each must provoke; right ones written differently."""

import math

import torch
from torch import nn
from torch.nn import functional as F

# 5.1: LoRALinear


class Right(nn.Module):
    """The frame of the answers below, which change one thing each."""

    def __init__(self, base_layer, r, lora_alpha):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.r, self.lora_alpha = r, lora_alpha
        self.lora_A = nn.Linear(base_layer.in_features, r, bias=False)
        self.lora_B = nn.Linear(r, base_layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.scaling = lora_alpha / r

    def forward(self, x):
        return self.base_layer(x) + self.scaling * self.lora_B(self.lora_A(x))


class BaseStillTrainable(Right):
    def __init__(self, base_layer, r, lora_alpha):
        super().__init__(base_layer, r, lora_alpha)
        base_layer.requires_grad_(True)


class BiasStillTrainable(Right):
    def __init__(self, base_layer, r, lora_alpha):
        super().__init__(base_layer, r, lora_alpha)
        if base_layer.bias is not None:
            base_layer.bias.requires_grad_(True)


class SwapsAandB(Right):
    def __init__(self, base_layer, r, lora_alpha):
        super().__init__(base_layer, r, lora_alpha)
        self.lora_A, self.lora_B = self.lora_B, self.lora_A

    def forward(self, x):
        return self.base_layer(x) + self.scaling * self.lora_A(self.lora_B(x))


class BothZero(Right):
    def __init__(self, base_layer, r, lora_alpha):
        super().__init__(base_layer, r, lora_alpha)
        nn.init.zeros_(self.lora_A.weight)


class ForgetsTheZeros(Right):
    def __init__(self, base_layer, r, lora_alpha):
        super().__init__(base_layer, r, lora_alpha)
        nn.init.normal_(self.lora_B.weight)


class ZeroAInstead(Right):
    def __init__(self, base_layer, r, lora_alpha):
        super().__init__(base_layer, r, lora_alpha)
        nn.init.normal_(self.lora_B.weight)
        nn.init.zeros_(self.lora_A.weight)


class AllOnes(Right):
    def __init__(self, base_layer, r, lora_alpha):
        super().__init__(base_layer, r, lora_alpha)
        nn.init.ones_(self.lora_A.weight)


class WithBiases(Right):
    def __init__(self, base_layer, r, lora_alpha):
        super().__init__(base_layer, r, lora_alpha)
        self.lora_A = nn.Linear(base_layer.in_features, r)


class PlainTensors(Right):
    def __init__(self, base_layer, r, lora_alpha):
        super().__init__(base_layer, r, lora_alpha)
        del self.lora_A
        self.lora_A = torch.randn(r, base_layer.in_features, requires_grad=True)

    def forward(self, x):
        return self.base_layer(x) + self.scaling * self.lora_B(x @ self.lora_A.T)


class NotScaled(Right):
    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class ScaledTwice(Right):
    def forward(self, x):
        return self.base_layer(x) + self.scaling * self.lora_B(self.scaling * self.lora_A(x))


class ScaledByAlpha(Right):
    def forward(self, x):
        return self.base_layer(x) + self.lora_alpha * self.lora_B(self.lora_A(x))


class ScaledUpsideDown(Right):
    def forward(self, x):
        return self.base_layer(x) + self.r / self.lora_alpha * self.lora_B(self.lora_A(x))


class ScaledBySqrt(Right):
    def forward(self, x):
        return self.base_layer(x) + self.lora_alpha / math.sqrt(self.r) * self.lora_B(self.lora_A(x))


class ScalesTheBaseToo(Right):
    def forward(self, x):
        return self.scaling * (self.base_layer(x) + self.lora_B(self.lora_A(x)))


class ForgetsTheBase(Right):
    def forward(self, x):
        return self.scaling * self.lora_B(self.lora_A(x)) + self.base_layer(torch.zeros_like(x)) * 0


class AddsTheBiasTwice(Right):
    def forward(self, x):
        y = self.base_layer(x) + self.scaling * self.lora_B(self.lora_A(x))
        return y if self.base_layer.bias is None or not self.lora_B.weight.any() else y + self.base_layer.bias


class FormsTheProduct(Right):
    def forward(self, x):
        product = self.lora_B.weight @ self.lora_A.weight
        return F.linear(x, self.base_layer.weight + self.scaling * product, self.base_layer.bias)


class DetachesA(Right):
    def forward(self, x):
        return self.base_layer(x) + self.scaling * self.lora_B(self.lora_A(x).detach())


class WithoutGrad(Right):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class ForgetsSuper(nn.Module):
    def __init__(self, base_layer, r, lora_alpha):
        self.base_layer = base_layer


def a_function(base_layer, r, lora_alpha):
    return lambda x: base_layer(x)


class RightWithParameters(nn.Module):
    def __init__(self, base_layer, r, lora_alpha):
        super().__init__()
        self.base_layer = base_layer
        for parameter in base_layer.parameters():
            parameter.requires_grad = False
        self.lora_A = nn.Parameter(torch.randn(r, base_layer.in_features) / r)
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, r))
        self.scale = lora_alpha / r

    def forward(self, x):
        return self.base_layer(x) + (x @ self.lora_A.T * self.scale) @ self.lora_B.T


class RightWithFunctional(Right):
    def forward(self, x):
        y = F.linear(x, self.base_layer.weight, self.base_layer.bias)
        return y + F.linear(F.linear(x, self.lora_A.weight), self.scaling * self.lora_B.weight)


# 5.2: insertion


def insert(model, target_modules, wrap, *, matches=None, freeze="before", complain=True):
    matches = matches or (lambda name, target: name == target or name.endswith("." + target))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in linear if any(matches(name, target) for target in target_modules)]
    if complain and not names:
        raise ValueError(f"nothing matches; there are {linear}")
    if freeze == "before":
        model.requires_grad_(False)
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, wrap(model.get_submodule(name)))
    if freeze == "after":
        model.requires_grad_(False)
    return names


def freezes_last(model, target_modules, wrap):
    return insert(model, target_modules, wrap, freeze="after")


def freezes_nothing(model, target_modules, wrap):
    return insert(model, target_modules, wrap, freeze="never")


def freezes_the_wrapped_alone(model, target_modules, wrap):
    def frozen(layer):
        return wrap(layer.requires_grad_(False))

    return insert(model, target_modules, frozen, freeze="never")


def matches_any_ending(model, target_modules, wrap):
    return insert(model, target_modules, wrap, matches=lambda name, target: name.endswith(target))


def matches_substrings(model, target_modules, wrap):
    return insert(model, target_modules, wrap, matches=lambda name, target: target in name)


def matches_whole_names_only(model, target_modules, wrap):
    return insert(model, target_modules, wrap, matches=lambda name, target: name == target)


def matches_last_part_only(model, target_modules, wrap):
    return insert(model, target_modules, wrap, matches=lambda name, target: name.split(".")[-1] == target)


def looks_at_children_only(model, target_modules, wrap):
    model.requires_grad_(False)
    names = [name for name, _ in model.named_children() if name in target_modules]
    for name in names:
        setattr(model, name, wrap(getattr(model, name)))
    return names


def sets_a_dotted_attribute(model, target_modules, wrap):
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    names = [n for n in names if any(n == t or n.endswith("." + t) for t in target_modules)]
    if not names:
        raise ValueError("there are fc1, fc2, fc3")
    model.requires_grad_(False)
    for name in names:
        model.__dict__[name] = wrap(model.get_submodule(name))
    return names


def replaces_while_walking(model, target_modules, wrap):
    model.requires_grad_(False)
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(target in name for target in target_modules):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, wrap(module))
            names.append(name)
            for inner, part in model.get_submodule(name).named_children():
                if isinstance(part, nn.Linear):
                    setattr(model.get_submodule(name), inner, wrap(part))
    return names


def is_silent_without_a_match(model, target_modules, wrap):
    return insert(model, target_modules, wrap, complain=False)


def says_too_little(model, target_modules, wrap):
    names = insert(model, target_modules, wrap, complain=False)
    if not names:
        raise ValueError("nothing found")
    return names


def returns_the_model(model, target_modules, wrap):
    insert(model, target_modules, wrap)
    return model


def returns_no_names(model, target_modules, wrap):
    insert(model, target_modules, wrap)


def inserts_recursively(model, target_modules, wrap):
    model.requires_grad_(False)
    found, there = [], []

    def visit(parent, prefix):
        for child, module in list(parent.named_children()):
            name = prefix + child
            if isinstance(module, nn.Linear):
                there.append(name)
                if any(("." + name).endswith("." + target) for target in target_modules):
                    setattr(parent, child, wrap(module))
                    found.append(name)
            else:
                visit(module, name + ".")

    visit(model, "")
    if not found:
        raise ValueError(f"none of {target_modules}, but {there}")
    return found


def uses_set_submodule(model, target_modules, wrap):
    targets = tuple("." + target for target in target_modules)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = [name for name in layers if f".{name}".endswith(targets)]
    if not chosen:
        raise ValueError("linear layers: " + " ".join(layers))
    for parameter in model.parameters():
        parameter.requires_grad = False
    for name in chosen:
        model.set_submodule(name, wrap(layers[name]))
    return tuple(chosen)


# 5.3: counting


def bill(trainable, gradients, adam):
    return {"trainable": trainable, "gradients": gradients, "adam": adam}


def counts_frozen_ones(model):
    size = sum(p.nbytes for p in model.parameters())
    return bill(sum(p.numel() for p in model.parameters()), size, 2 * size)


def counts_elements(model):
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return bill(n, n, 2 * n)


def believes_in_four_bytes(model):
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return bill(n, 4 * n, 8 * n)


def counts_one_moment(model):
    size = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return bill(sum(p.numel() for p in model.parameters() if p.requires_grad), size, size)


def counts_shared_tensors_twice(model):
    found = [p for _, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    size = sum(p.nbytes for p in found)
    return bill(sum(p.numel() for p in found), size, 2 * size)


def reads_gradients_that_are_not_there(model):
    size = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return bill(sum(p.numel() for p in model.parameters() if p.requires_grad), size, 2 * size)


def returns_a_tuple(model):
    return tuple(right_bill(model).values())


def right_bill(model):
    count = gradients = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            count += parameter.numel()
            gradients += parameter.numel() * parameter.element_size()
    return bill(count, gradients, gradients * 2)


def right_bill_by_doing(model):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients:
        return bill(0, 0, 0)
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    optimizer.step()
    state = [t for entry in optimizer.state.values() for name, t in entry.items() if name != "step"]
    total = sum(t.nbytes for t in gradients)
    return bill(sum(t.numel() for t in gradients), total, sum(t.nbytes for t in state))


# 5.4: merge and unmerge


@torch.no_grad()
def merge(layer, merged, *, factor=None, sign=-1.0, guard=True):
    if guard and layer.merged == merged:
        return
    factor = layer.scaling if factor is None else factor
    update = factor * layer.lora_B.weight @ layer.lora_A.weight
    layer.base_layer.weight += update if merged else sign * update
    layer.merged = merged


def forgets_the_scale(layer, merged):
    merge(layer, merged, factor=1.0)


def scales_twice(layer, merged):
    merge(layer, merged, factor=layer.scaling**2)


def adds_in_both_directions(layer, merged):
    merge(layer, merged, sign=1.0)


def subtracts_to_merge(layer, merged):
    merge(layer, merged, factor=-layer.scaling)


def adds_again_each_time(layer, merged):
    merge(layer, merged, guard=False)


def forgets_the_flag(layer, merged):
    before = layer.merged
    merge(layer, merged)
    layer.merged = before


def sets_the_flag_alone(layer, merged):
    layer.merged = merged


def only_merges(layer, merged):
    if merged:
        merge(layer, True)
    layer.merged = merged


def lets_autograd_see_it(layer, merged):
    if layer.merged != merged:
        update = layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
        layer.base_layer.weight += update if merged else -update
        layer.merged = merged


def lets_autograd_see_it_in_place(layer, merged):
    if layer.merged != merged:
        update = layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
        layer.base_layer.weight.add_(update if merged else -update)
        layer.merged = merged


def makes_a_new_parameter(layer, merged):
    if layer.merged != merged:
        update = layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
        new = layer.base_layer.weight + (update if merged else -update)
        layer.base_layer.weight = nn.Parameter(new.detach())
        layer.merged = merged


def changes_nothing_in_place(layer, merged):
    if layer.merged != merged:
        weight = layer.base_layer.weight
        weight = weight + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
        layer.merged = merged


def multiplies_the_wrong_way_round(layer, merged):
    with torch.no_grad():
        layer.base_layer.weight += layer.lora_A.weight @ layer.lora_B.weight


def unfreezes(layer, merged):
    merge(layer, merged)
    layer.base_layer.weight.requires_grad_(True)


def merges_row_by_row(layer, merged):
    sign = int(merged) - int(layer.merged)
    A, B = layer.lora_A.weight.detach(), layer.lora_B.weight.detach()
    for row in range(len(B)):
        layer.base_layer.weight.data[row] += sign * layer.scaling * (B[row] @ A)
    layer.merged = bool(merged)


def merges_from_a_kept_copy(layer, merged):
    if merged and not layer.merged:
        layer.kept = layer.base_layer.weight.detach().clone()
        merge(layer, True)
    elif layer.merged and not merged:
        layer.base_layer.weight.data.copy_(layer.kept)
        layer.merged = False


# 5.5: export


def files(layers, r, lora_alpha, base, *, key="base_model.model.{path}.{name}.weight", **config):
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": lora_alpha,
        "target_modules": list(layers),
        "bias": "none",
        "base_model_name_or_path": base,
    } | config
    tensors = {
        key.format(path=path, name=name): getattr(layer, name).weight.detach()
        for path, layer in layers.items()
        for name in ("lora_A", "lora_B")
    }
    return config, tensors


def forgets_the_prefix(*arguments):
    return files(*arguments, key="{path}.{name}.weight")


def names_the_adapter(*arguments):
    return files(*arguments, key="base_model.model.{path}.{name}.default.weight")


def forgets_the_weight(*arguments):
    return files(*arguments, key="base_model.model.{path}.{name}")


def swaps_the_factors(*arguments):
    config, tensors = files(*arguments)
    other = {"lora_A": "lora_B", "lora_B": "lora_A"}
    swap = lambda key: (
        key.replace("lora_A", "lora_?").replace("lora_B", other["lora_B"]).replace("lora_?", "lora_B")
    )
    return config, {swap(key): tensor for key, tensor in tensors.items()}


def transposes(*arguments):
    config, tensors = files(*arguments)
    return config, {key: tensor.T for key, tensor in tensors.items()}


def scales_b_as_well(layers, r, lora_alpha, base):
    config, tensors = files(layers, r, lora_alpha, base)
    for key in tensors:
        if "lora_B" in key:
            tensors[key] = tensors[key] * lora_alpha / r
    return config, tensors


def saves_the_base_too(layers, r, lora_alpha, base):
    config, tensors = files(layers, r, lora_alpha, base)
    for path, layer in layers.items():
        tensors[f"base_model.model.{path}.base_layer.weight"] = layer.base_layer.weight.detach()
    return config, tensors


def writes_the_scaling_as_alpha(layers, r, lora_alpha, base):
    config, tensors = files(layers, r, lora_alpha, base)
    return config | {"lora_alpha": lora_alpha / r}, tensors


def forgets_the_type(*arguments):
    config, tensors = files(*arguments)
    del config["peft_type"]
    return config, tensors


def forgets_the_targets(*arguments):
    return files(*arguments, target_modules=None)


def targets_the_last_parts(*arguments):
    return files(*arguments, target_modules=["0"])


def puts_tensors_into_the_config(layers, r, lora_alpha, base):
    return files(layers, r, lora_alpha, base, extra=torch.ones(1))


def asks_for_rslora(*arguments):
    return files(*arguments, use_rslora=True)


def returns_tensors_alone(*arguments):
    return files(*arguments)[1]


def right_files_with_more_settings(*arguments):
    config, tensors = files(
        *arguments, task_type=None, lora_dropout=0.0, use_rslora=False, inference_mode=True
    )
    return config, {key: tensor.clone() for key, tensor in tensors.items()}


def right_files_from_state_dicts(layers, r, lora_alpha, base):
    tensors = {
        f"base_model.model.{path}.{name}": tensor
        for path, layer in layers.items()
        for name, tensor in layer.state_dict().items()
        if name.startswith("lora_")
    }
    return files(layers, r, lora_alpha, base)[0], tensors


WRONG = {
    "5.1": [
        (BaseStillTrainable, r"in 6, out 5, r 2.*: base_layer\.weight still requires a gradient"),
        (BiasStillTrainable, r"base_layer\.bias still requires a gradient"),
        (SwapsAandB, r"lora_A is \[5, 2\], expected \[2, 6\]"),
        (BothZero, r"A and B are both 0"),
        (ForgetsTheZeros, r"B is not 0 at the start"),
        (ZeroAInstead, r"A is 0 and B is random.*the other way round"),
        (AllOnes, r"the rows of A are not independent"),
        (WithBiases, r"lora_A has a bias"),
        (PlainTensors, r"lora_A is of type Tensor, which no optimizer finds"),
        (NotScaled, r"B A x is not scaled, expected once by lora_alpha / r = 4"),
        (ScaledTwice, r"B A x is scaled twice, expected once"),
        (ScaledByAlpha, r"B A x is scaled by lora_alpha, expected once"),
        (ScaledUpsideDown, r"B A x is scaled by r / lora_alpha, expected once"),
        (ScaledBySqrt, r"B A x is scaled by lora_alpha / sqrt\(r\), expected once"),
        (ScalesTheBaseToo, r"the output at the start\[0, 0\] is .*, expected"),
        (ForgetsTheBase, r"the output at the start\[0, 0\] is 0, expected|the base's W x"),
        (AddsTheBiasTwice, r"the bias is added twice"),
        (FormsTheProduct, r"the forward of x \[1, 6\] \(is B A formed\?\): 180 FLOPs, the budget is 104"),
        (DetachesA, r"A\.grad is None after backward"),
        (WithoutGrad, r"the output has no graph"),
        (ForgetsSuper, r"raised AttributeError"),
        (a_function, r"is of type function, expected an nn\.Module"),
    ],
    "5.2": [
        (freezes_last, r"fc1\.lora_A\.weight is frozen too\. Freeze first"),
        (freezes_nothing, r"an MLP.*: fc1\.base_layer\.weight still requires a gradient"),
        (freezes_the_wrapped_alone, r"an MLP.*: fc2\.weight still requires a gradient"),
        (matches_any_ending, r"12 blocks.*: 11\.v_proj was wrapped, expected only 1\.v_proj, 3\.q_proj"),
        (matches_substrings, r"11\.v_proj was wrapped"),
        (matches_whole_names_only, r"12 blocks.*: a ValueError, expected .* to match"),
        (matches_last_part_only, r"1\.v_proj.*: a ValueError, expected .* to match"),
        (looks_at_children_only, r"wrap was called 0 times for 0\.q_proj"),
        (sets_a_dotted_attribute, r"0\.q_proj is still the old nn\.Linear"),
        (replaces_while_walking, r"part of a wrapped one|wrap was called 2 times"),
        (is_silent_without_a_match, r"\['fc4'\] matches no layer, and nothing was said"),
        (says_too_little, r"The error says 'nothing found': name what exists"),
        (returns_the_model, r"you returned <class .*MLP"),
        (returns_no_names, r"you returned None"),
    ],
    "5.3": [
        (counts_frozen_ones, r"fc3 alone: trainable is 199,210, expected 2,010: that counts frozen"),
        (
            counts_elements,
            r"all of it: gradients is 199,210, expected 796,840: that is the number of elements",
        ),
        (believes_in_four_bytes, r"float64: gradients is .*: that is right for 4 bytes a number"),
        (counts_one_moment, r"all of it: adam is 796,840, expected 1,593,680: that is one moment"),
        (counts_shared_tensors_twice, r"share a weight: trainable is .*: a shared tensor counts once"),
        (reads_gradients_that_are_not_there, r"all of it: gradients is 0, expected 796,840"),
        (returns_a_tuple, r"expected a dict with the keys trainable, gradients, adam"),
    ],
    "5.4": [
        (forgets_the_scale, r"call 1, .*: base_layer\.weight is changed by B A, not scaled"),
        (scales_twice, r"call 1, .*: base_layer\.weight is changed by B A scaled twice"),
        (adds_in_both_directions, r"call 3, .*: base_layer\.weight is changed by the update twice"),
        (subtracts_to_merge, r"call 1, .*: base_layer\.weight is changed by minus the update"),
        (adds_again_each_time, r"call 2, .*: base_layer\.weight is changed by the update twice"),
        (forgets_the_flag, r"call 1, .*: layer\.merged is False, expected True"),
        (sets_the_flag_alone, r"call 1, .*: base_layer\.weight is unchanged"),
        (only_merges, r"call 3, .*: base_layer\.weight is still changed by the update"),
        (lets_autograd_see_it, r"call 1, .*: autograd sees the change"),
        (lets_autograd_see_it_in_place, r"call 1, .*: base_layer\.weight has a graph behind it"),
        (makes_a_new_parameter, r"call 1, .*: base_layer\.weight is another Parameter"),
        (changes_nothing_in_place, r"call 1, .*: base_layer\.weight is unchanged"),
        (multiplies_the_wrong_way_round, r"raised RuntimeError"),
        (unfreezes, r"call 1, .*: base_layer\.weight requires a gradient"),
    ],
    "5.5": [
        (forgets_the_prefix, r"tensors has no 'base_model\.model\.0\.lora_A\.weight'; it has \['0\.lora_A"),
        (names_the_adapter, r"tensors has no 'base_model\.model\.0\.lora_A\.weight'"),
        (forgets_the_weight, r"tensors has no 'base_model\.model\.0\.lora_A\.weight'"),
        (swaps_the_factors, r"lora_A\.weight has shape \[5, 2\], expected \[2, 6\]"),
        (transposes, r"lora_A\.weight has shape \[6, 2\], expected \[2, 6\]"),
        (scales_b_as_well, r"lora_B\.weight\[0, 0\] is .*, expected"),
        (saves_the_base_too, r"base_layer\.weight', which is no part of the adapter"),
        (writes_the_scaling_as_alpha, r"config\['lora_alpha'\] is 3\.0, expected 6"),
        (forgets_the_type, r"config\['peft_type'\] is None, expected 'LORA'"),
        (forgets_the_targets, r"config\['target_modules'\] is None"),
        (targets_the_last_parts, r"config\['target_modules'\] is \['0'\]"),
        (puts_tensors_into_the_config, r"config cannot be written as JSON"),
        (asks_for_rslora, r"the output with PEFT.* is .*, expected"),
        (returns_tensors_alone, r"you returned dict, expected two dicts"),
    ],
}
RIGHT = {
    "5.1": [RightWithParameters, RightWithFunctional],
    "5.2": [inserts_recursively, uses_set_submodule],
    "5.3": [right_bill, right_bill_by_doing],
    "5.4": [merges_row_by_row, merges_from_a_kept_copy],
    "5.5": [right_files_with_more_settings, right_files_from_state_dicts],
}
