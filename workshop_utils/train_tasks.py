"""What workshop_utils.train trains: handwritten digits (notebooks 03 and 04), or sentences to JSON records (08).

A task says what one process has to compute; train.py deals with processes. A task has

    .model                    the network on the device, the same on each rank
    .unit_type                the name of the class whose modules are FSDP's units
    .settings                 what a run that goes on from a checkpoint must share
    .batches(steps)           global batches, the same on each rank
    .loss_sum(model, batch, rank, world_size)
                              (the loss summed over this rank's share, what to divide by: the count in the whole batch)
    .num_right(model, rank, world_size)
                              (how many of this rank's share of the test set are right, how many there are in all)
    .warm_up(model)           a number that depends on all that is trained, from the smallest input

`DEFAULTS` are the options that the command line leaves open. Shape letters: B samples in a batch, T tokens, V words.
"""

import argparse
import contextlib
import io
from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from workshop_utils.data import MNIST, load_mnist
from workshop_utils.models import MLP, SmallViT
from workshop_utils.training import draw_batches

# model -> how to make it, and which of its modules are FSDP's units
DIGIT_MODELS = {"mlp": (MLP, "Linear"), "vit": (SmallViT, "EncoderBlock")}
TEST_RECORDS, TEST_SEED = 64, 1


class Digits:
    """A classifier of MNIST's images. The order of the images depends on the seed alone."""

    DEFAULTS: ClassVar = {"steps": 200, "batch_size": 256, "learning_rate": 1e-3}

    def __init__(self, options: argparse.Namespace, device: torch.device):
        self.data = load_data(device)
        make_model, self.unit_type = DIGIT_MODELS[options.model]
        self.model = make_model().to(device)
        self.options, self.device = options, device
        self.settings = {"num_images": len(self.data.train_images)}

    def batches(self, steps: int) -> Iterator[Tensor]:
        """Index tensors [B]."""
        return draw_batches(len(self.data.train_images), self.options.batch_size, steps, self.options.seed)

    def loss_sum(self, model, batch: Tensor, rank: int, world_size: int) -> tuple[Tensor, int]:
        """Cross-entropy of this rank's images, and the number of images in the batch."""
        share = batch[rank::world_size]
        logits, labels = model(self.data.train_images[share]), self.data.train_labels[share]
        return F.cross_entropy(logits, labels, reduction="sum"), len(batch)

    def num_right(self, model, rank: int, world_size: int) -> tuple[Tensor, int]:
        """Test images that are right, and their number. Every rank does equally many forwards."""
        images, labels = self.data.test_images[rank::world_size], self.data.test_labels[rank::world_size]
        pieces = -(-len(self.data.test_images) // world_size // 1000) + 1
        parts = zip(images.tensor_split(pieces), labels.tensor_split(pieces))
        right = sum((model(part).argmax(dim=1) == wanted).sum() for part, wanted in parts)
        return right, len(self.data.test_images)

    def warm_up(self, model) -> Tensor:
        """The sum of the logits of one black image."""
        return model(torch.zeros(1, 784, device=self.device)).sum()


class Records:
    """SmolLM2 learns to write a sentence as a JSON record (records.py): all weights, or an adapter on all linear layers.

    Float32. With --quantize nf4 the linear layers are held in 4 bits before the model comes to the device, and they
    are not in the checkpoints: each start makes the same codes from the fetched weights.
    """

    DEFAULTS: ClassVar = {"steps": 40, "batch_size": 8, "learning_rate": 4e-4}
    unit_type = "LlamaDecoderLayer"

    def __init__(self, options: argparse.Namespace, device: torch.device):
        from workshop_utils.language_model import load_language_model
        from workshop_utils.lora import apply_lora
        from workshop_utils.qlora import SHARDABLE_STORAGE, apply_qlora

        self.model, self.tokenizer = load_language_model()
        if options.lora_r:
            settings = {"target_modules": "all-linear", "r": options.lora_r, "lora_alpha": 2 * options.lora_r}
            if options.quantize == "nf4":
                apply_qlora(self.model, **settings, quant_storage=SHARDABLE_STORAGE)
            else:
                apply_lora(self.model, **settings)
        self.model.to(device).train()
        self.options, self.device = options, device
        self.settings = {"lora_r": options.lora_r, "quantize": options.quantize}

    def batches(self, steps: int) -> Iterator[dict[str, Tensor]]:
        """input_ids, attention_mask and labels, each [B, T]."""
        from workshop_utils.records import training_batches

        return training_batches(steps, self.options.batch_size, self.tokenizer, self.options.seed)

    def loss_sum(self, model, batch: dict[str, Tensor], rank: int, world_size: int) -> tuple[Tensor, int]:
        """Cross-entropy of the answers in this rank's records, and the number of answer tokens in the batch.

        Answers differ in length. So a rank's mean would weigh its tokens by who else shares the rank.
        """
        count = int((batch["labels"][:, 1:] != -100).sum())
        logits, labels = self._next_tokens(model, batch, slice(rank, None, world_size))
        total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        return total, count

    def num_right(self, model, rank: int, world_size: int) -> tuple[Tensor, int]:
        """Test records that greedy decoding would write token by token, and their number.

        It would exactly if each token of the answer is the likeliest after the true ones before it, and that takes one
        forward. Every rank does equally many.
        """
        from workshop_utils.records import as_batch, make_records

        records = make_records(TEST_RECORDS, split="test", seed=TEST_SEED)
        per_batch = 8 * world_size
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        for first in range(0, len(records), per_batch):
            batch = as_batch(records[first : first + per_batch], self.tokenizer)
            share = slice(rank, None, world_size)
            if len(batch["labels"][share]) == 0:  # the forward of others needs this rank too
                logits, _ = self._next_tokens(model, batch, slice(0, 1))
                continue
            logits, labels = self._next_tokens(model, batch, share)
            right += ((logits.argmax(dim=2) == labels) | (labels == -100)).all(dim=1).sum()
        return right, len(records)

    def warm_up(self, model) -> Tensor:
        """The sum of the logits of one token."""
        return model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device)).logits.sum()

    def _next_tokens(self, model, batch: dict[str, Tensor], rows: slice) -> tuple[Tensor, Tensor]:
        """Logits [B, T - 1, V] and the tokens [B, T - 1] that they are about, -100 where nothing is asked."""
        ids, mask, labels = (
            batch[key][rows].to(self.device) for key in ("input_ids", "attention_mask", "labels")
        )
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits[:, :-1], labels[:, 1:]


MODELS = {"mlp": Digits, "vit": Digits, "smollm2": Records}


def load_data(device: torch.device) -> MNIST:
    """The images, on the device. Rank 0 says from where."""
    others = dist.is_initialized() and dist.get_rank()
    with contextlib.redirect_stdout(io.StringIO()) if others else contextlib.nullcontext():
        data = load_mnist()
    tensors = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    return MNIST(*(tensor.to(device) for tensor in tensors), data.source)
