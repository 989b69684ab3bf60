"""A small skill to teach a language model: a sentence about a purchase to a JSON record. Notebooks 07 and 08.

    "Vini bought 8 fresh cups for 972 rupees."
    {"name": "Vini", "item": "fresh cups", "quantity": 8, "price": 972}

The model is never told which keys are wanted, so it has to learn the form; the values it copies. Names and nouns of the
test are not in the training sentences; one template is in neither of them and is reported by itself.

Shape letters: B records in the batch, T tokens, padding included.
"""

import itertools
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

TEMPLATES = (
    "{name} bought {quantity} {item} for {price} rupees.",
    "For {price} rupees, {name} took home {quantity} {item}.",
    "{quantity} {item} were sold to {name} at {price} rupees.",
    "The order of {name}: {quantity} {item}, {price} rupees in all.",
)
NEW_TEMPLATE = "We charged {price} rupees for the {quantity} {item} that {name} picked."
# fmt: off
TRAIN_NAMES = (
    "Amit", "Bela", "Carl", "Dana", "Emil", "Farah", "Gita", "Hans", "Ines", "Jamal", "Kira", "Leo",
    "Mona", "Nils", "Olga", "Pavel", "Rosa", "Samir", "Tara", "Uma", "Viktor", "Wanda", "Yusuf", "Zoe",
    "Aurelio", "Benedikt", "Catarina", "Delphine", "Eduardo", "Filippa", "Giovanna", "Henrike", "Isolde", "Joaquin",
    "Katarzyna", "Lorenzo", "Matilda", "Nadezhda", "Octavio", "Philippa", "Quentin", "Rafaela", "Soraya", "Thandiwe",
    "Ulrike", "Valentina", "Wilhelm", "Yolanda",
)
TEST_NAMES = (
    "Vini", "Arjun", "Brigitte", "Chen", "Dmitri", "Elena", "Fatima", "Goran", "Hiro", "Ingrid", "Kwame", "Lucia",
)
ADJECTIVES = ("fresh", "old", "blue", "small", "heavy", "round", "cheap", "green", "large", "clean")
TRAIN_NOUNS = (
    "apples", "books", "chairs", "doors", "eggs", "flowers", "gloves", "hats", "jars", "kites", "lemons", "maps",
    "nails", "onions", "pens", "ropes", "shirts", "tables", "vases", "wheels", "boots", "candles", "spoons", "keys",
)
TEST_NOUNS = (
    "cups", "melons", "lamps", "bricks", "scarves", "plates", "drums", "towels", "pencils", "buckets", "tents",
    "mirrors",
)
# fmt: on
SPLITS = {
    "train": (TEMPLATES, TRAIN_NAMES, TRAIN_NOUNS),
    "test": (TEMPLATES, TEST_NAMES, TEST_NOUNS),
    "new_template": ((NEW_TEMPLATE,), TEST_NAMES, TEST_NOUNS),
}
IGNORED = -100  # a label that transformers leaves out of the loss
MAX_NEW_TOKENS = 40  # the longest answer has 34

Record = dict[str, str | int]


@dataclass(frozen=True)
class RecordTuning:
    """What `fine_tune` saw: the loss of each step before its update, the time of each, and their median."""

    losses: list[float]
    times_s: list[float]

    @property
    def step_s(self) -> float:
        return statistics.median(self.times_s)


def make_records(num: int, *, split: str = "train", seed: int) -> list[tuple[str, Record]]:
    """`num` pairs (sentence, record) drawn with `seed`; split is "train", "test" or "new_template".

    Raises ValueError for another split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    templates, names, nouns = SPLITS[split]
    draw = random.Random(f"{split} {seed}")  # a string: the same draws in every process
    return [_one_record(draw, templates, names, nouns) for _ in range(num)]


def prompt(sentence: str) -> str:
    """What the model reads before it answers."""
    return f"Sentence: {sentence}\nJSON:"


def answer(record: Record) -> str:
    """What it should write; after it comes the tokenizer's end-of-sequence token."""
    return " " + json.dumps(record)


def as_batch(records: Sequence[tuple[str, Record]], tokenizer) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels, each [B, T] int64, padded on the right.

    Labels are IGNORED everywhere except on the answer and the end token: the sentence is read, not learned.
    """
    rows, labels = [], []
    for sentence, record in records:
        read = tokenizer(prompt(sentence), add_special_tokens=False)["input_ids"]
        write = tokenizer(answer(record), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append(read + write)
        labels.append([IGNORED] * len(read) + write)
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        "labels": torch.tensor([row + [IGNORED] * (length - len(row)) for row in labels]),
    }


def training_batches(steps: int, batch_size: int, tokenizer, seed: int) -> Iterator[dict[str, Tensor]]:
    """`steps` batches of new training records, the same for the same seed."""
    records = make_records(steps * batch_size, split="train", seed=seed)
    for first in range(0, len(records), batch_size):
        yield as_batch(records[first : first + batch_size], tokenizer)


def fine_tune(
    model: nn.Module,
    tokenizer,
    steps: int,
    *,
    batch_size: int = 8,
    learning_rate: float = 6e-4,
    seed: int = 0,
    stop_after: int | None = None,
    progress: bool = True,
) -> RecordTuning:
    """Train whatever parameters of `model` require a gradient, in place, with AdamW.

    The rate falls from `learning_rate` in a straight line to 0: at a constant rate the last steps still move so far that
    single names of the test come out wrong. `stop_after` ends a run of `steps` steps earlier, to see its beginning.

    The model is a transformers one, with LoRA, QLoRA or PEFT's layers or with none of them. `seed` decides the
    records, and the draws of dropout. Times hold forward, backward and update. Leaves the model in eval mode.
    Raises ValueError if nothing is trainable.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    torch.manual_seed(seed)
    losses, times_s = [], []
    batches = itertools.islice(training_batches(steps, batch_size, tokenizer, seed), stop_after)
    model.train()
    with tqdm(total=min(steps, stop_after or steps), desc="steps", disable=not progress) as bar:
        for batch in batches:
            began_s = time.perf_counter()
            optimizer.zero_grad()
            loss = model(**_on(batch, trainable[0].device)).loss
            loss.backward()
            optimizer.step()
            falling.step()
            losses.append(loss.item())
            times_s.append(time.perf_counter() - began_s)
            bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
            bar.update()
    model.eval()
    return RecordTuning(losses, times_s)


@torch.no_grad()
def mean_loss(
    model: nn.Module, tokenizer, records: Sequence[tuple[str, Record]], *, batch_size: int = 16
) -> float:
    """The mean cross-entropy per answered token over all records, in nats."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for first in range(0, len(records), batch_size):
        batch = as_batch(records[first : first + batch_size], tokenizer)
        tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += model(**_on(batch, _device_of(model))).loss.item() * tokens
        count += tokens
    model.train(was_training)
    return total / count


def exact_match(
    model: nn.Module, tokenizer, records: Sequence[tuple[str, Record]], *, batch_size: int = 16
) -> float:
    """The share of records that greedy generation gives back whole: valid JSON, all keys, all values. 0 to 1."""
    written = generate_answers(model, tokenizer, [sentence for sentence, _ in records], batch_size=batch_size)
    return sum(parsed(text) == record for text, (_, record) in zip(written, records, strict=True)) / len(
        records
    )


@torch.no_grad()
def generate_answers(
    model: nn.Module, tokenizer, sentences: Sequence[str], *, batch_size: int = 16
) -> list[str]:
    """What the model writes after each prompt, greedily, up to its end token or MAX_NEW_TOKENS.

    Prompts of a batch are padded on the left: the next token comes right after the last one of each.
    """
    was_training = model.training
    model.eval()
    written = []
    for first in range(0, len(sentences), batch_size):
        inputs = _left_padded([prompt(text) for text in sentences[first : first + batch_size]], tokenizer)
        out = model.generate(
            **_on(inputs, _device_of(model)),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        new_tokens = out[:, inputs["input_ids"].shape[1] :]
        written += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    model.train(was_training)
    return written


def parsed(text: str) -> object:
    """The JSON value that `text` is, or None where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def _left_padded(texts: list[str], tokenizer) -> dict[str, Tensor]:
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[tokenizer.pad_token_id] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


def _one_record(draw: random.Random, templates, names, nouns) -> tuple[str, Record]:
    record = {
        "name": draw.choice(names),
        "item": f"{draw.choice(ADJECTIVES)} {draw.choice(nouns)}",
        "quantity": draw.randint(2, 60),
        "price": draw.randint(20, 999),
    }
    return draw.choice(templates).format(**record), record


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _on(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}
