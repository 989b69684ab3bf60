"""A training step of SmolLM2 with QLoRA: ours beside PEFT with bitsandbytes and LoRA in 16 bits, in turns."""

import os
import statistics
import time

import torch
from record_qlora import BATCH_SIZE, LEARNING_RATE, LORA_ALPHA, R, adapted, storage_bytes
from torch import nn

from workshop_utils.language_model import FETCH_COMMAND, is_fetched, load_language_model
from workshop_utils.lora import apply_lora
from workshop_utils.records import training_batches

TITLE = "QLoRA: ours beside PEFT with bitsandbytes"
ROUNDS = 12
METHODS = {
    "ours": "qlora",
    "PEFT + bitsandbytes": "peft bitsandbytes",
    "LoRA, all in bfloat16": "lora bf16",
}


def run() -> str:
    if not is_fetched():
        return f"Not measured: SmolLM2 is not in the cache. `{FETCH_COMMAND}` brings it."
    models = [
        lora_on_bf16() if method == "lora bf16" else adapted(method, 0)[0] for method in METHODS.values()
    ]
    steps = [make_step(model) for model in models]
    times_s, tokens = [[] for _ in METHODS], []
    for i, batch in enumerate(training_batches(ROUNDS + 2, BATCH_SIZE, load_language_model()[1], seed=0)):
        tokens.append(int(batch["attention_mask"].sum()))
        for k in range(len(METHODS)):
            who = (i + k) % len(METHODS)  # who begins changes
            began_s = time.perf_counter()
            steps[who](batch)
            times_s[who].append(time.perf_counter() - began_s)
    times_s = [times[2:] for times in times_s]
    rows = "\n".join(
        f"| {name} | {statistics.median(seconds) * 1e3:,.0f} ms | {ratio(times_s[0], seconds)} | "
        f"{sum(tokens[2:]) / sum(seconds):,.0f} | "
        f"{storage_bytes([*model.parameters(), *model.buffers()]) / 1e6:.1f} MB |"
        for name, seconds, model in zip(METHODS, times_s, models)
    )
    return (
        f"SmolLM2-135M, r = 8 on all linear layers, NF4 with double quantisation, bfloat16 products, batches of "
        f"{BATCH_SIZE} sentences ({statistics.mean(tokens):,.0f} tokens), AdamW; {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads. They take turns on the same batches, {ROUNDS} rounds. Ours / theirs: the "
        "median, and between which two values the middle half of the rounds lies.\n\n"
        f"| | step, median | ours / theirs | tokens/s | model and adapter |\n|---|---:|---:|---:|---:|\n{rows}"
    )


def ratio(ours: list[float], theirs: list[float]) -> str:
    if ours is theirs:
        return ""
    low, median, high = statistics.quantiles([a / b for a, b in zip(ours, theirs)], n=4)
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def lora_on_bf16() -> nn.Module:
    """All in bfloat16, the adapters too."""
    torch.manual_seed(0)
    return apply_lora(load_language_model(torch.bfloat16)[0], "all-linear", R, LORA_ALPHA)


def make_step(model: nn.Module):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    model.train()

    def step(batch) -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    print(run())
