"""The networks: sizes that the notebooks quote."""

import ast
from pathlib import Path

import torch
from torch import nn

from workshop_utils.models import MLP, LeNet, SmallViT, make_mlp


def test_mlp_has_the_papers_number_of_parameters():
    assert sum(p.numel() for p in MLP().parameters()) == 199_210
    assert sum(p.numel() for p in MLP(hidden=400).parameters()) == 478_410


def test_mlp_gives_a_score_per_class_and_image():
    scores = MLP()(torch.rand(7, 784))
    assert scores.shape == (7, 10)
    assert (scores < 0).any()  # logits, no ReLU and no softmax at the end


def test_mlp_layers_are_named_in_forward_order():
    names = [name for name, _ in MLP().named_parameters()]
    assert names == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "fc3.weight", "fc3.bias"]


def test_the_notebook_shows_the_class_that_later_notebooks_import():
    source = Path(__file__).parents[1] / "notebooks/src/01_single_device_mlp.py"
    classes = [node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)]
    namespace = {"nn": nn}
    exec(compile(ast.Module(classes, []), "notebook 01", "exec"), namespace)  # noqa: S102  our own source
    shown, images = namespace["MLP"](), torch.rand(3, 784)
    imported = MLP()
    shown.load_state_dict(imported.state_dict())
    assert shown(images).equal(imported(images))


def test_vit_takes_the_same_images_and_every_parameter_gets_a_gradient():
    model = SmallViT()
    assert sum(p.numel() for p in model.parameters()) == 211_338
    scores = model(torch.rand(5, 784))
    assert scores.shape == (5, 10)
    nn.functional.cross_entropy(scores, torch.arange(5)).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_lenet_is_the_one_whose_intrinsic_dimension_was_published():
    model = LeNet()
    assert sum(p.numel() for p in model.parameters()) == 44_426
    scores = model(torch.rand(3, 784))
    assert scores.shape == (3, 10)
    nn.functional.cross_entropy(scores, torch.arange(3)).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_mlps_of_any_width_and_depth_have_the_papers_sizes():
    sizes = {
        (depth, width): sum(p.numel() for p in make_mlp(width, depth).parameters())
        for depth in (1, 2, 5)
        for width in (50, 200, 400)
    }
    assert sizes[2, 200] == 199_210 and sizes[2, 400] == 478_410 and sizes[1, 50] == 39_760
    assert sizes[5, 400] == 959_610


def test_the_signal_keeps_its_size_through_a_deep_mlp():
    torch.manual_seed(0)
    model, images = make_mlp(400, 5), torch.rand(100, 784)
    first, last = model[0](images), model[8](model[:8](images))
    assert 0.5 < last.std() / first.std() < 2
