"""Checks of notebook 05, LoRA.

Factors and weights of the checks are small whole numbers, so that every right order of the products gives the same
float32. Counts and bytes are compared with those of a real step, files with what the library PEFT makes of them.

Shape letters: B rows in the batch; W is [out, in], A is [r, in], B is [out, r].
"""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from workshop_utils.checks import Wrong, exercise, expect_at_most, expect_close, tensors_for_ranks
from workshop_utils.checks.adapters import (
    Marked,
    bill_cases,
    expect_config,
    expect_output,
    expect_state,
    expect_tensors,
    explain_merge,
    insertion_cases,
    is_near,
    measured_bill,
    output_with_peft,
    set_factors_,
    whole_numbers_linear,
)
from workshop_utils.lora import LoRALinear, apply_lora
from workshop_utils.models import MLP


@exercise("5.1")
def check_lora_linear(answer):
    """`answer(base_layer, r, lora_alpha)` is a module: the frozen layer plus lora_alpha / r times B A x."""
    for n_in, n_out, r, alpha, bias in ((6, 5, 2, 8, True), (5, 7, 3, 6, False), (8, 3, 1, 4, True)):
        base = whole_numbers_linear(n_in, n_out, bias)
        layer = answer(base, r, alpha)
        case = f"in {n_in}, out {n_out}, r {r}, lora_alpha {alpha}"
        if not isinstance(layer, nn.Module):
            raise Wrong(f"LoRALinear(...) is of type {type(layer).__name__}, expected an nn.Module")
        A = _factor(case, layer, "lora_A", (r, n_in))
        B = _factor(case, layer, "lora_B", (n_out, r))
        _expect_trainable(case, layer, (A, B), r * (n_in + n_out))
        _expect_start(case, layer, base, A, B, r)
        _expect_product(case, layer, base, A, B, r, alpha)
    return "nothing changes at first, A and B alone are trained, and the product is scaled once"


@exercise("5.2")
def check_insert_lora(answer):
    """`answer(model, target_modules, wrap)` replaces the matching nn.Linear by wrap(layer) and freezes the rest."""
    for case, model, targets, wanted in insertion_cases():
        layers = dict(model.named_modules())
        called = []

        def wrap(layer, called=called, layers=layers):
            name = next((name for name, module in layers.items() if module is layer), None)
            if name is None:
                raise Wrong("wrap was given a layer that is part of a wrapped one. Go through a list")
            called.append(name)
            return Marked(layer)

        try:
            returned = answer(model, list(targets), wrap)
        except ValueError as error:
            if called:
                raise
            raise Wrong(
                f"{case}: a ValueError, expected {wanted} to match. It says: {error!s:.60} ..."
            ) from None
        for name in called:
            if name not in wanted:
                raise Wrong(f"{case}: {name} was wrapped, expected only {', '.join(wanted)}")
        for name in wanted:
            _expect_inserted(case, model, name, layers[name], called.count(name))
        for name, parameter in model.named_parameters():
            ours = ".lora_" in name
            if parameter.requires_grad and not ours:
                raise Wrong(f"{case}: {name} still requires a gradient, expected it frozen")
            if ours and not parameter.requires_grad:
                raise Wrong(f"{case}: {name} is frozen too. Freeze first, then insert")
        if not isinstance(returned, (list, tuple)) or list(returned) != wanted:
            shown = returned if returned is None or isinstance(returned, (list, tuple)) else type(returned)
            raise Wrong(f"{case}: you returned {shown!r:.100}, expected the names {wanted}")
    _expect_error_without_match(answer)
    return "whole names and their ends match, the rest is frozen, and a name that matches nothing is an error"


@exercise("5.3")
def check_training_bill(answer):
    """`answer(model)` is {"trainable": count, "gradients": bytes, "adam": bytes}, before any step."""
    for case, model in bill_cases():
        got = answer(copy.deepcopy(model))
        if not isinstance(got, dict) or set(got) != {"trainable", "gradients", "adam"}:
            raise Wrong(f"you returned {got!r:.80}, expected a dict with the keys trainable, gradients, adam")
        wanted = measured_bill(model)
        everything = list(model.parameters())
        twice = [p for _, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
        known = {
            sum(p.numel() for p in everything): "that counts frozen parameters",
            sum(p.nbytes for p in everything): "that counts frozen parameters",
            2 * sum(p.nbytes for p in everything): "that counts frozen parameters",
            sum(p.numel() for p in twice): "a shared tensor counts once",
        }
        for kind, value in wanted.items():
            if got[kind] == value:
                continue
            why = known.get(got[kind], "") if got[kind] else ""
            if kind != "trainable" and got[kind] == wanted["trainable"] != value:
                why = "that is the number of elements"
            elif kind == "adam" and 2 * got[kind] == value:
                why = "that is one moment, Adam keeps two"
            elif kind != "trainable" and got[kind] == wanted["trainable"] * (4 if kind == "gradients" else 8):
                why = "that is right for 4 bytes a number"
            got_text = f"{got[kind]:,}" if isinstance(got[kind], (int, float)) else repr(got[kind])
            raise Wrong(f"{case}: {kind} is {got_text}, expected {value:,}" + (f": {why}" if why else ""))
    return "right to the byte: full, last layer, LoRA, two dtypes, a shared tensor, nothing trainable"


@exercise("5.4")
def check_set_merged(answer):
    """`answer(layer, merged)` brings a LoRALinear into that state, in place; twice is as good as once."""
    for n_in, n_out, r, alpha in ((6, 5, 2, 8), (4, 4, 3, 6), (3, 7, 1, 4)):
        layer = LoRALinear(whole_numbers_linear(n_in, n_out, True), r, alpha)
        set_factors_(layer.lora_A.weight, layer.lora_B.weight)
        parameter, weight = layer.base_layer.weight, layer.base_layer.weight.detach().clone()
        x = tensors_for_ranks(1, (4, n_in), seed=8)[0]
        with torch.no_grad():
            y = layer(x).clone()
        product = layer.lora_B.weight.detach() @ layer.lora_A.weight.detach()
        for number, merged in enumerate((True, True, False, False, True, False), start=1):
            where = f"call {number}, set_merged_(layer, {merged})"
            try:
                answer(layer, merged)
            except ValueError as error:
                if "non-leaf" not in str(error):
                    raise
                raise Wrong(f"{where}: autograd sees the change. Work under torch.no_grad()") from None
            expect_state(where, layer, merged, parameter)
            scale = alpha / r if merged else 0.0
            explain_merge(where, layer.base_layer.weight.detach() - weight, product, alpha / r, scale)
            expect_close(
                layer.base_layer.weight, weight + scale * product, name=f"{where}: base_layer.weight"
            )
            expect_output(where, layer, x, y, merged)
    return "merged, the layer is one matrix product; unmerged, W is back; a second call changes nothing"


@exercise("5.5")
def check_peft_files(answer):
    """`answer(layers, r, lora_alpha, base_model_name_or_path)` is (config, tensors) as PEFT reads them."""
    base = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)))
    model = apply_lora(copy.deepcopy(base), ["0", "2.0"], r=2, lora_alpha=6)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    for seed, layer in enumerate(layers.values()):
        set_factors_(layer.lora_A.weight, layer.lora_B.weight, seed, scale=1 / 8)
    got = answer(dict(layers), 2, 6, "my-base")
    if not isinstance(got, tuple) or len(got) != 2 or not all(isinstance(part, dict) for part in got):
        raise Wrong(f"you returned {type(got).__name__}, expected two dicts: config, tensors")
    expect_tensors(got[1], layers)
    expect_config(got[0], list(layers))
    expected = model(torch.ones(2, 6)).detach()
    got_y, atol = output_with_peft(base, *got), 1e-6 * expected.abs().max().item()
    expect_close(got_y, expected, name="the output with PEFT", rtol=0, atol=atol)
    return "PEFT itself read config and tensors, and its model gives your outputs to 1e-6"


# Exercise 5.1


def _factor(case, layer, name, shape):
    """The tensor of `lora_A` or `lora_B`, written as nn.Linear or as nn.Parameter."""
    found = getattr(layer, name, None)
    if found is None:
        raise Wrong(f"the layer has no {name}")
    if isinstance(found, nn.Linear):
        if found.bias is not None:
            raise Wrong(f"{name} has a bias, expected bias=False")
        found = found.weight
    if not isinstance(found, nn.Parameter):
        kind = type(found).__name__
        raise Wrong(f"{name} is of type {kind}, which no optimizer finds; expected nn.Linear or nn.Parameter")
    if tuple(found.shape) != shape:
        raise Wrong(f"{case}: {name} is {list(found.shape)}, expected {list(shape)}")
    return found


def _expect_trainable(case, layer, factors, budget):
    ours = {id(p) for p in factors}
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad and id(parameter) not in ours:
            raise Wrong(f"{case}: {name} still requires a gradient, expected it frozen")
    trainable = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    if trainable != budget:
        raise Wrong(f"{case}: {trainable} trainable parameters, expected r (in + out) = {budget}")


def _expect_start(case, layer, base, A, B, r):
    if not A.any() and not B.any():
        raise Wrong(f"{case}: A and B are both 0, so both gradients are 0 for ever. Draw A at random")
    if not A.any():
        raise Wrong(
            f"{case}: A is 0 and B is random. In LoRA it is the other way round: draw A, and let B be 0"
        )
    if B.any():
        raise Wrong(f"{case}: B is not 0 at the start, so the new layer does not compute what the base does")
    if torch.linalg.matrix_rank(A.detach()) < r:
        raise Wrong(f"{case}: the rows of A are not independent, so r is wasted. Draw A at random")
    x = torch.ones(2, base.in_features)
    expect_close(layer(x), base(x).detach(), name=f"{case}: the output at the start")


def _expect_product(case, layer, base, A, B, r, alpha):
    set_factors_(A, B)
    for shape in ((1, base.in_features), (2, 3, base.in_features)):
        x = tensors_for_ranks(1, shape, seed=3)[0]
        update = (x @ A.detach().T) @ B.detach().T
        plain = base(x).detach()
        with FlopCounterMode(display=False) as counter:
            y = layer(x)
        got = y.detach() - plain if isinstance(y, torch.Tensor) and y.shape == plain.shape else None
        if got is not None:
            _explain_scale(case, got, update, plain, base.bias, r, alpha)
        expect_close(y, plain + alpha / r * update, name=f"{case}: y for x {list(shape)}")
        rows, width = x.numel() // base.in_features, base.in_features + base.out_features
        budget = 2 * rows * (base.in_features * base.out_features + r * width)
        name = f"{case}: the forward of x {list(shape)} (is B A formed?)"
        expect_at_most(counter.get_total_flops(), budget, name=name, unit="FLOPs")
    if not y.requires_grad:
        raise Wrong(f"{case}: the output has no graph: nothing would be trained")
    y.square().sum().backward()
    for name, parameter in (("A", A), ("B", B)):
        if parameter.grad is None:
            raise Wrong(f"{case}: {name}.grad is None after backward: is it detached in the forward?")


def _explain_scale(case, got, update, plain, bias, r, alpha):
    """Name the wrong scale, if the update is right but for a factor."""
    known = [
        (1, "B A x is not scaled"),
        (alpha, "B A x is scaled by lora_alpha"),
        (r / alpha, "B A x is scaled by r / lora_alpha"),
        ((alpha / r) ** 2, "B A x is scaled twice"),
        (alpha / r**0.5, "B A x is scaled by lora_alpha / sqrt(r)"),
        (0, "B A x is not added"),
    ]
    for factor, words in known:
        if abs(factor - alpha / r) > 1e-9 and is_near(got, factor * update):
            raise Wrong(f"{case}: {words}, expected once by lora_alpha / r = {alpha / r:g}")
    if bias is not None and is_near(got, alpha / r * update + bias.detach()):
        raise Wrong(f"{case}: the bias is added twice")
    if is_near(got + plain, alpha / r * update):
        raise Wrong(f"{case}: y is the update alone, the base's W x + bias is missing")


# Exercise 5.2


def _expect_inserted(case, model, name, layer, times):
    if times != 1:
        raise Wrong(f"{case}: wrap was called {times} times for {name}, expected once")
    found = model.get_submodule(name)
    if found is layer:
        raise Wrong(f"{case}: {name} is still the old nn.Linear: set the new one in its parent module")
    if not isinstance(found, Marked) or found.base_layer is not layer:
        raise Wrong(f"{case}: {name} is {type(found).__name__}, expected wrap(the layer that was there)")


def _expect_error_without_match(answer):
    try:
        answer(MLP(hidden=4), ["fc4"], Marked)
    except ValueError as error:
        if "fc1" not in str(error):
            raise Wrong(
                f"['fc4'] matches nothing. The error says {str(error)!r}: name what exists, fc1, ..."
            ) from None
    else:
        raise Wrong("['fc4'] matches no layer, and nothing was said; expected a ValueError")


# Exercise 5.3
