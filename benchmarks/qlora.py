"""A training step of SmolLM2 with QLoRA: ours beside PEFT with bitsandbytes, in turns. Tokens per second of each."""

import os
import statistics
import time

import torch
from record_qlora import BATCH_SIZE, LEARNING_RATE, adapted, storage_bytes
from torch import nn

from workshop_utils.language_model import FETCH_COMMAND, is_fetched
from workshop_utils.records import training_batches

TITLE = "QLoRA: ours beside PEFT with bitsandbytes"
ROUNDS = 12
METHODS = ("qlora", "peft bitsandbytes")


def run() -> str:
    if not is_fetched():
        return f"Not measured: SmolLM2 is not in the cache. `{FETCH_COMMAND}` brings it."
    models = [adapted(method, 0) for method in METHODS]
    tokenizer = models[0][1]
    steps = [make_step(model) for model, _ in models]
    times_s, tokens = [[] for _ in METHODS], []
    for i, batch in enumerate(training_batches(ROUNDS + 2, BATCH_SIZE, tokenizer, seed=0)):
        tokens.append(int(batch["attention_mask"].sum()))
        for k in range(len(METHODS)):
            who = (i + k) % len(METHODS)  # who begins changes
            began_s = time.perf_counter()
            steps[who](batch)
            times_s[who].append(time.perf_counter() - began_s)
    ours, theirs = ([value for value in times[2:]] for times in times_s)
    low, median, high = statistics.quantiles([a / b for a, b in zip(ours, theirs)], n=4)
    rows = "\n".join(
        f"| {name} | {statistics.median(seconds) * 1e3:,.0f} ms | {sum(tokens[2:]) / sum(seconds):,.0f} | "
        f"{storage_bytes([*model.parameters(), *model.buffers()]) / 1e6:.1f} MB |"
        for name, seconds, (model, _) in zip(("ours", "PEFT + bitsandbytes"), (ours, theirs), models)
    )
    return (
        f"SmolLM2-135M, r = 8 on all linear layers, NF4 with double quantisation, bfloat16 products, batches of "
        f"{BATCH_SIZE} sentences ({statistics.mean(tokens):,.0f} tokens), AdamW; {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads. The two take turns on the same batches, {ROUNDS} rounds. Ours / theirs: "
        f"median {median:.2f}, the middle half of the rounds {low:.2f} to {high:.2f}.\n\n"
        f"| | step, median | tokens/s | model and adapter |\n|---|---:|---:|---:|\n{rows}"
    )


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
