"""What the check of exercise 6.1 looks at in a subspace module. Shape letters: D parameters, d directions."""

import copy

import torch
from torch import nn

from workshop_utils.checks import Wrong, expect_close

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def two_layers():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def with_batch_norm():
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3, bias=False))


def only_trained(case, built, D, d):
    if not isinstance(built, nn.Module):
        raise Wrong(f"{case}: Subspace(module, P) is of type {type(built).__name__}, expected an nn.Module")
    trained = {name: p for name, p in built.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        if parameter.numel() == D * d:
            raise Wrong(
                f"{case}: {name} {list(parameter.shape)} is an nn.Parameter that requires a gradient: P itself would be"
                " trained, D times d numbers. Make it a buffer"
            )
    if not trained:
        held = [n for n, v in vars(built).items() if isinstance(v, torch.Tensor) and v.numel() == d]
        known = f" ({held[0]} is a plain tensor)" if held else ""
        raise Wrong(
            f"{case}: no parameter requires a gradient, expected theta_d [{d}] as nn.Parameter{known}"
        )
    if len(trained) > 1:
        raise Wrong(
            f"{case}: {len(trained)} parameters require a gradient ({', '.join(trained)}), expected one, theta_d."
            " Is the module frozen?"
        )
    ((name, theta_d),) = trained.items()
    if list(theta_d.shape) != [d]:
        raise Wrong(
            f"{case}: {name} has shape {list(theta_d.shape)}, expected [{d}], the number of P's columns"
        )
    if theta_d.detach().any():
        raise Wrong(
            f"{case}: {name} starts at {theta_d.tolist()}, expected zeros: training begins at theta_0"
        )
    return theta_d


def expect_p_not_saved(case, built, D, d):
    for name, tensor in built.state_dict().items():
        if tensor.numel() == D * d:
            raise Wrong(
                f"{case}: state_dict() has {name} {list(tensor.shape)}, expected no P in it: its seed can make it"
                " again. register_buffer takes persistent=False"
            )


def compare_moved(case, built, theta_d, module, P, images):
    """Output and gradient away from theta_0, twice, and back."""
    for seed in (7, 8):
        with torch.no_grad():
            theta_d.copy_(torch.randn(len(theta_d), generator=torch.Generator().manual_seed(seed)))
        theta_d.grad = None
        moved = copy.deepcopy(module)
        start = nn.utils.parameters_to_vector(module.parameters()).detach()
        nn.utils.vector_to_parameters(start + P @ theta_d.detach(), moved.parameters())
        wanted, got = moved(images), built(images)
        _explain_output(case, got, wanted, module, P, theta_d.detach(), images)
        expect_close(got, wanted, name=f"{case}: the output at a theta_d that is not 0", **CLOSE)
        wanted.square().mean().backward()
        if not got.requires_grad:
            raise Wrong(
                f"{case}: the output has no graph behind it, so theta_d gets no gradient: was it cut?"
            )
        got.square().mean().backward()
        if theta_d.grad is None:
            raise Wrong(
                f"{case}: theta_d.grad is None after backward(). The graph is cut where the weights are put into the"
                " module: .data, nn.Parameter(...) and copy_ under no_grad keep the numbers only"
            )
        full = torch.cat([p.grad.flatten() for p in moved.parameters()])
        expect_close(theta_d.grad, P.T @ full, name=f"{case}: the gradient of theta_d", **CLOSE)
    with torch.no_grad():
        theta_d.zero_()
    name = f"{case}: the output back at theta_d = 0 (theta_0 must stay what it was)"
    expect_close(built(images), module(images), name=name, **CLOSE)


def _explain_output(case, got, wanted, module, P, theta_d, images):
    """Name the mistake behind a wrong output, if it is one that people make."""
    if not isinstance(got, torch.Tensor) or got.shape != wanted.shape or torch.allclose(got, wanted, **CLOSE):
        return
    start = nn.utils.parameters_to_vector(module.parameters()).detach()
    for theta, mistake in (
        (start, "theta_0's: theta_d has no effect. Is P theta_d computed once, in __init__?"),
        (P @ theta_d, "that of P theta_d alone: theta_0 is not added"),
        (start - P @ theta_d, "that of theta_0 - P theta_d"),
    ):
        moved = copy.deepcopy(module)
        nn.utils.vector_to_parameters(theta, moved.parameters())
        if torch.allclose(got, moved(images), **CLOSE):
            raise Wrong(f"{case}: the output at a theta_d that is not 0 is {mistake}")


def expect_it_follows(case, built, images):
    """.to(another dtype) takes everything along."""
    built.to(torch.float64)
    try:
        got = built(images.double())
    except RuntimeError as error:
        raise Wrong(
            f"{case}: after .to(torch.float64) the forward fails ({str(error).splitlines()[0]}). A plain tensor does not"
            " follow .to(): P must be a registered buffer"
        ) from None
    if got.dtype != torch.float64:
        raise Wrong(f"{case}: after .to(torch.float64) the output is {got.dtype}: something did not follow")
