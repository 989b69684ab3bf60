"""A training step of SmolLM2 with QLoRA: ours beside PEFT with bitsandbytes and LoRA in 16 bits, in turns."""

import torch
from cells import milliseconds, missing, number, ratio, section, table
from record_qlora import BATCH_SIZE, LEARNING_RATE, LORA_ALPHA, R, adapted, storage_bytes
from torch import nn
from turns import WARM_UP, take_turns

from workshop_utils.language_model import FETCH_COMMAND, is_fetched, load_language_model
from workshop_utils.lora import apply_lora
from workshop_utils.records import training_batches

TITLE = "QLoRA: ours beside PEFT with bitsandbytes"
ROUNDS = 12
OURS, WHAT = "ours", "a step of our QLoRA, SmolLM2-135M"
METHODS = {
    OURS: "qlora",
    "PEFT + bitsandbytes": "peft bitsandbytes",
    "LoRA, all in bfloat16": "lora bf16",
}


def run() -> dict:
    """A row for each method; without the language model, the same rows say so."""
    columns = ["", "step, median", "ours / theirs", "tokens/s", "model and adapter"]
    return section(
        TITLE,
        "SmolLM2-135M, r = 8 on all linear layers, NF4 with double quantisation, bfloat16 products, batches of "
        f"{BATCH_SIZE} sentences, AdamW; as many threads as torch takes. They take turns on the same batches, {ROUNDS} "
        "rounds.",
        table(columns, measured_rows() if is_fetched() else missing_rows()),
    )


def missing_rows() -> list[list]:
    why = f"SmolLM2 is not in the cache; `{FETCH_COMMAND}` brings it"
    return [
        [name, missing(why), "" if name == OURS else missing(why, WHAT, name), missing(why), missing(why)]
        for name in METHODS
    ]


def measured_rows() -> list[list]:
    models = [
        lora_on_bf16() if method == "lora bf16" else adapted(method, 0)[0] for method in METHODS.values()
    ]
    batches = list(training_batches(ROUNDS + WARM_UP, BATCH_SIZE, load_language_model()[1], seed=0))
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches[WARM_UP:])
    all_s = take_turns([make_step(model, batches) for model in models], ROUNDS)
    return [
        [
            name,
            milliseconds(times_s, 0),
            "" if name == OURS else ratio(all_s[0], times_s, WHAT, name),
            number(tokens / sum(times_s)),
            number(storage_bytes([*model.parameters(), *model.buffers()]) / 1e6, 1, " MB"),
        ]
        for name, times_s, model in zip(METHODS, all_s, models, strict=True)
    ]


def lora_on_bf16() -> nn.Module:
    """All in bfloat16, the adapters too."""
    torch.manual_seed(0)
    return apply_lora(load_language_model(torch.bfloat16)[0], "all-linear", R, LORA_ALPHA)


def make_step(model: nn.Module, batches: list):
    """A function that does one training step, with the next of `batches` at each call."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    model.train()
    coming = iter(batches)

    def step() -> None:
        optimizer.zero_grad()
        model(**next(coming)).loss.backward()
        optimizer.step()

    return step
