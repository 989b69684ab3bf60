"""The networks: sizes that the notebooks quote."""

import ast
from pathlib import Path

import torch
from torch import nn

from workshop_utils.models import MLP, SmallViT


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
