"""Record what a quantised SmolLM2 costs when it is used, what merging costs, and what 8-bit optimizers save.

    nice -n 10 python benchmarks/record_inference.py [PART ...]

writes workshop_utils/recorded_inference.json, which notebook 07 shows. About eight minutes on two idle cores. Each
part is kept in build/record_inference/ and not repeated: delete its file to repeat it. Needs `python -m workshop_utils
fetch`. Keys beside `command`, `machine`, `recorded`, `settings`:

    speed       {form of the base: {"model_bytes", "tokens_per_s" (median of ROUNDS rounds in which all forms take turns),
                 "load_average"}}; greedy, NUM_SEQUENCES at once, NEW_TOKENS each; a token of each sequence counts
    merging     {way: {"exact_match": {split: share}, "loss": {split: nats}}} of one QLoRA adapter, r = 8, after STEPS
                 steps: "unmerged"; "merged, bfloat16" (dequantised + adapter); "merged, NF4 again" (the same, rounded to
                 4 bits); "merged into the weights before NF4, bfloat16" (what the adapter was not trained beside);
                 and "base in NF4" without it
    optimizers  {optimizer: {"state_bytes", "parameters", "bytes_per_parameter", "loss" of each step, "note"}}
"""

import copy
import json
import os
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from record_qlora import (
    BATCH_SIZE,
    LEARNING_RATE,
    LORA_ALPHA,
    NUM_TEST,
    R,
    in_bitsandbytes,
    scores,
    storage_bytes,
)
from torch import nn

from workshop_utils.language_model import MODEL_NAME, load_language_model
from workshop_utils.lora import (
    LoRALinear,
    adapter_state_dict,
    apply_lora,
    load_adapter_state_dict,
    merge_lora,
)
from workshop_utils.qlora import NF4Linear, apply_qlora, merge_qlora
from workshop_utils.records import fine_tune, make_records, prompt, training_batches

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "workshop_utils/recorded_inference.json"
KEPT = ROOT / "build/record_inference"
STEPS, SEED, ROUNDS, NUM_SEQUENCES, NEW_TOKENS = 40, 0, 5, 4, 32


def in_nf4(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """SmolLM2 with our NF4 layers and no adapter; embedding and norms in `dtype`, which is the compute dtype too."""
    model, _ = load_language_model(dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, NF4Linear(module))
    return model


def speed() -> dict:
    load_average = round(os.getloadavg()[0], 1)
    _, tokenizer = load_language_model()
    forms = {
        "float32": load_language_model(torch.float32)[0],
        "bfloat16": load_language_model(torch.bfloat16)[0],
        "NF4, ours": in_nf4(),
        "NF4, bitsandbytes": in_bitsandbytes(torch.bfloat16),
    }
    texts = [prompt(sentence) for sentence, _ in make_records(NUM_SEQUENCES, split="test", seed=1)]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    times_s = {name: [] for name in forms}
    for i in range(ROUNDS + 1):  # the first one warms up
        for name, model in forms.items():
            times_s[name].append(generation_s(model, inputs, 4 if i == 0 else NEW_TOKENS))
    return {
        name: {
            "model_bytes": storage_bytes([*model.parameters(), *model.buffers()]),
            "tokens_per_s": round(NUM_SEQUENCES * NEW_TOKENS / statistics.median(times_s[name][1:]), 2),
            "load_average": load_average,
        }
        for name, model in forms.items()
    }


@torch.no_grad()
def generation_s(model: nn.Module, inputs, new_tokens: int) -> float:
    began_s = time.perf_counter()
    model.generate(**inputs, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens)
    return time.perf_counter() - began_s


def merging() -> dict:
    torch.manual_seed(SEED)
    model, tokenizer = load_language_model()
    apply_qlora(model, "all-linear", R, LORA_ALPHA, compute_dtype=torch.bfloat16)
    found = {"base in NF4": scores(model, tokenizer)}
    fine_tune(model, tokenizer, STEPS, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE, seed=SEED)
    adapter = adapter_state_dict(model)
    found["unmerged"] = scores(model, tokenizer)
    good = merge_qlora(copy.deepcopy(model), torch.bfloat16).to(torch.bfloat16)
    found["merged, bfloat16"] = scores(good, tokenizer)
    found["merged, NF4 again"] = scores(merge_qlora(model), tokenizer)
    original, _ = load_language_model()
    apply_lora(original, "all-linear", R, LORA_ALPHA)
    load_adapter_state_dict(original, adapter)
    merge_lora(original)
    for name, layer in list(original.named_modules()):
        if isinstance(layer, LoRALinear):
            original.set_submodule(name, layer.base_layer)
    found["merged into the weights before NF4, bfloat16"] = scores(original.to(torch.bfloat16), tokenizer)
    return found


def optimizers() -> dict:
    """Four steps with each optimizer on the same adapter: bytes of its state, losses, what bitsandbytes said."""
    from bitsandbytes import optim

    kinds = {
        "AdamW, 32 bits (torch)": lambda tensors: torch.optim.AdamW(
            tensors, lr=LEARNING_RATE, weight_decay=0.0
        ),
        "AdamW, 8 bits": lambda tensors: optim.AdamW8bit(tensors, lr=LEARNING_RATE, weight_decay=0.0),
        "AdamW, 8 bits, paged": lambda tensors: optim.PagedAdamW8bit(
            tensors, lr=LEARNING_RATE, weight_decay=0.0
        ),
    }
    found = {}
    for name, make in kinds.items():
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found[name] = with_optimizer(make)
        about_paging = [" ".join(str(warning.message).split()) for warning in said]
        found[name]["note"] = next((text for text in about_paging if "aged" in text), "")
    return found


def with_optimizer(make) -> dict:
    torch.manual_seed(SEED)
    model, tokenizer = load_language_model(torch.bfloat16)
    apply_qlora(model, "all-linear", R, LORA_ALPHA)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = []
    try:
        optimizer = make(trained)
        for batch in training_batches(4, BATCH_SIZE, tokenizer, SEED):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(round(loss.item(), 4))
    except (RuntimeError, NotImplementedError, AttributeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", "loss": losses}
    states = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim() > 0
    ]
    shared = {value.untyped_storage().data_ptr(): value for value in states}  # the 8-bit tables are shared
    count = sum(parameter.numel() for parameter in trained)
    state_bytes = sum(value.untyped_storage().nbytes() for value in shared.values())
    return {
        "state_bytes": state_bytes,
        "parameters": count,
        "bytes_per_parameter": round(state_bytes / count, 3),
        "paged": bool(getattr(optimizer, "is_paged", False)),
        "state_dtypes": sorted({str(value.dtype).removeprefix("torch.") for value in states}),
        "state_devices": sorted({str(value.device) for value in states}),
        "loss": losses,
    }


PARTS = {"optimizers": optimizers, "speed": speed, "merging": merging}


def main(names: list[str]) -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    for name in names or PARTS:
        path = KEPT / f"{name}.json"
        if not path.exists():
            print(f"{name} ...", flush=True)
            result = PARTS[name]()
            path.with_suffix(".part").write_text(json.dumps(result), encoding="utf-8")
            path.with_suffix(".part").replace(path)
            print(json.dumps(result, indent=1), flush=True)
    done = [name for name in PARTS if (KEPT / f"{name}.json").exists()]
    record = {
        "command": "python benchmarks/record_inference.py",
        "machine": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.system()} {platform.machine()}, torch {torch.__version__}",
        "recorded": time.strftime("%Y-%m-%d"),
        "settings": {
            "model": MODEL_NAME,
            "sequences": NUM_SEQUENCES,
            "new_tokens": NEW_TOKENS,
            "steps": STEPS,
            "test_records": NUM_TEST,
        },
        **{name: json.loads((KEPT / f"{name}.json").read_text(encoding="utf-8")) for name in done},
    }
    OUTPUT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {OUTPUT.name} with {', '.join(done)}")


if __name__ == "__main__":
    unknown = [name for name in sys.argv[1:] if name not in PARTS]
    if unknown:
        sys.exit(f"unknown part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    main(sys.argv[1:])
