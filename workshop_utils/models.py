"""The networks that the notebooks train. Notebook 01 writes the MLP inline; later ones import it.

No model knows that it is parallel: data parallelism, sharding, LoRA and subspaces wrap it from outside.

Shape letters: B images in the batch, D = 784 pixels, H hidden units, C = 10 classes.
"""

from torch import Tensor, nn


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
