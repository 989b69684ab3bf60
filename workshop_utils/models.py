"""The networks that the notebooks train. Notebook 01 writes the MLP inline; later ones import it; 04 brings the ViT,
06 the networks whose intrinsic dimension Li et al. 2018 measured.

No model knows that it is parallel: data parallelism, sharding, LoRA and subspaces wrap it from outside.

Shape letters: B images in the batch, D = 784 pixels, H hidden units, C = 10 classes.
"""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """784-200-200-10 with ReLU: 199,210 parameters, the "FC 2x200" of Li et al. 2018 (arXiv:1804.08838)."""

    def __init__(self, hidden: int = 200):
        super().__init__()
        self.fc1 = nn.Linear(784, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, 10)

    def forward(self, images_BD: Tensor) -> Tensor:
        """Images [B, 784], floats in 0..1, to class scores [B, 10] (logits: no softmax)."""
        h_BH = self.fc1(images_BD).relu()
        h_BH = self.fc2(h_BH).relu()
        return self.fc3(h_BH)


def make_mlp(width: int, depth: int) -> nn.Sequential:
    """784 pixels, `depth` hidden layers of `width` units with ReLU, 10 scores: the "FC depth x width" of Li et al.

    The weights are He-normal and the biases 0 (He et al. 2015, arXiv:1502.01852), as in their experiments: torch's own
    initial weights let the signal fade in deep networks.
    """
    sizes = [784] + depth * [width]
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    for layer in model[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return model


class LeNet(nn.Module):
    """The convolutional network of Li et al. 2018 for MNIST, after LeCun et al. 1998: 44,426 parameters."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, kernel_size=5)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.fc1 = nn.Linear(16 * 4 * 4, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, images_BD: Tensor) -> Tensor:
        """Images [B, 784], floats in 0..1, to class scores [B, 10]."""
        h = images_BD.view(-1, 1, 28, 28)
        h = F.max_pool2d(self.conv1(h).relu(), 2)  # [B, 6, 12, 12]
        h = F.max_pool2d(self.conv2(h).relu(), 2)  # [B, 16, 4, 4]
        h = self.fc2(self.fc1(h.flatten(1)).relu()).relu()
        return self.fc3(h)


class SmallViT(nn.Module):
    """torchvision's vision transformer (Dosovitskiy et al. 2020, arXiv:2010.11929), small enough for a CPU.

    An image is cut into 16 patches of 7 x 7; `layers` encoder blocks of `width` features, 4 heads.
    """

    def __init__(self, layers: int = 4, width: int = 64):
        from torchvision.models import VisionTransformer  # takes 2 s to import, and the MLP needs none of it

        super().__init__()
        self.vit = VisionTransformer(
            image_size=28,
            patch_size=7,
            num_layers=layers,
            num_heads=4,
            hidden_dim=width,
            mlp_dim=4 * width,
            num_classes=10,
        )
        nn.init.trunc_normal_(
            self.vit.heads.head.weight, std=0.02
        )  # torchvision's zeros: no gradient behind them

    def forward(self, images_BD: Tensor) -> Tensor:
        """Images [B, 784], floats in 0..1, to class scores [B, 10]. The three colour channels get the same grey."""
        return self.vit(images_BD.view(-1, 1, 28, 28).expand(-1, 3, -1, -1))
