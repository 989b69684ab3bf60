"""Record what SmolLM2 learns with LoRA and with QLoRA, ours and PEFT's. About 15 minutes on two idle cores.

    nice -n 10 python benchmarks/record_qlora.py [RUN ...]

writes workshop_utils/recorded_qlora.json, which notebook 07 shows. Each run is kept in build/record_qlora/RUN.json and
not repeated: an interrupted recording goes on, and runs may be named. Delete a file to repeat its run. Needs
`python -m workshop_utils fetch`. Keys beside `command`, `machine`, `recorded`, `settings`:

    base   exact_match and loss of the untrained model on "test" and "new_template"
    runs   {run: {"method", "learning_rate", "seed", "losses" (one per step, before its update), "step_s" (median),
           "exact_match" and "loss" after the last step on "test" and "new_template", "model_bytes" (all parameters and
           buffers, adapter included), "adapter_bytes", "optimizer" is AdamW's: two float32 moments per adapter number,
           "load_average" before the run: above 1, step_s says little}}

Methods: "lora" and "peft lora" hold the base in float32 and compute in it; "qlora" and "peft bitsandbytes" hold it in
NF4 with double quantisation, blocks of 64, compute in bfloat16 and keep embedding and norms in float32. All train the
same batches from the same A, B = 0.
"""

import json
import os
import platform
import sys
import time
from pathlib import Path

import torch
from torch import nn

from workshop_utils.language_model import MODEL_NAME, load_language_model, model_folder
from workshop_utils.lora import apply_lora
from workshop_utils.qlora import apply_qlora
from workshop_utils.records import exact_match, fine_tune, make_records, mean_loss

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "workshop_utils/recorded_qlora.json"
KEPT = ROOT / "build/record_qlora"
STEPS, BATCH_SIZE, LEARNING_RATE, HIGH_RATE = 40, 8, 6e-4, 2e-3
R, LORA_ALPHA, NUM_TEST, TEST_SEED = 8, 16, 48, 1000
RUNS = {  # name: method, learning rate, seed
    "qlora seed 0": ("qlora", LEARNING_RATE, 0),
    "peft bitsandbytes seed 0": ("peft bitsandbytes", LEARNING_RATE, 0),
    "lora seed 0": ("lora", LEARNING_RATE, 0),
    "peft lora seed 0": ("peft lora", LEARNING_RATE, 0),
    "qlora rate 2e-3 seed 0": ("qlora", HIGH_RATE, 0),
    "qlora seed 1": ("qlora", LEARNING_RATE, 1),
    "qlora seed 2": ("qlora", LEARNING_RATE, 2),
}


def adapted(method: str, seed: int) -> tuple[nn.Module, object]:
    """(model, tokenizer) with trainable adapters; the seed alone decides A, whatever the method."""
    if method == "peft bitsandbytes":
        model, tokenizer = in_bitsandbytes(), load_language_model()[1]
    else:
        model, tokenizer = load_language_model()
    if method.startswith("peft"):
        return with_peft(model, seed), tokenizer
    torch.manual_seed(seed)
    if method == "lora":
        return apply_lora(model, "all-linear", R, LORA_ALPHA), tokenizer
    return apply_qlora(model, "all-linear", R, LORA_ALPHA, compute_dtype=torch.bfloat16), tokenizer


def in_bitsandbytes(dtype: torch.dtype = torch.float32) -> nn.Module:
    """SmolLM2 with bitsandbytes' NF4 layers, as transformers loads it; embedding and norms in `dtype`."""
    from transformers import BitsAndBytesConfig, LlamaForCausalLM
    from transformers.utils import logging

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    where = {"local_files_only": True, "device_map": {"": "cpu"}}
    logging.disable_progress_bar()
    return LlamaForCausalLM.from_pretrained(model_folder(), quantization_config=config, dtype=dtype, **where)


def with_peft(model: nn.Module, seed: int) -> nn.Module:
    """PEFT's LoRA around `model`, with the A that apply_lora and apply_qlora draw from this seed."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=R, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config)
    torch.manual_seed(seed)
    drawn = apply_lora(load_language_model()[0], "all-linear", R, LORA_ALPHA)
    factors = {name: layer for name, layer in drawn.named_modules() if name.endswith("lora_A")}
    copied = 0
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if ".lora_A." in name:
                path = name.removeprefix("base_model.model.").replace(".default.weight", "")
                parameter.copy_(factors[path].weight)
                copied += 1
    assert copied == len(factors), f"{copied} of {len(factors)} factors were copied"
    return peft_model


def storage_bytes(tensors) -> int:
    """Bytes of the storages of tensors, each storage once; the states of bitsandbytes' layers included."""
    storages = {}
    for tensor in tensors:
        state = getattr(tensor, "quant_state", None)
        parts = [tensor, *(bitsandbytes_scales(state) if state is not None else [])]
        storages.update(
            {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
        )
    return sum(storages.values())


def bitsandbytes_scales(state) -> list[torch.Tensor]:
    """What a QuantState of bitsandbytes holds beside the codes; its tables of levels are left out."""
    nested = [state.state2.absmax, state.offset] if state.nested else []
    return [state.absmax, *nested]


def scores(model: nn.Module, tokenizer) -> dict:
    """exact_match and loss on the test sentences and on the template that training never sees."""
    found = {"exact_match": {}, "loss": {}}
    for split in ("test", "new_template"):
        records = make_records(NUM_TEST, split=split, seed=TEST_SEED)
        found["exact_match"][split] = round(exact_match(model, tokenizer, records, batch_size=32), 4)
        found["loss"][split] = round(mean_loss(model, tokenizer, records), 5)
    return found


def one_run(method: str, learning_rate: float, seed: int) -> dict:
    load_average = round(os.getloadavg()[0], 1)
    model, tokenizer = adapted(method, seed)
    seen = fine_tune(model, tokenizer, STEPS, batch_size=BATCH_SIZE, learning_rate=learning_rate, seed=seed)
    return {
        "method": method,
        "learning_rate": learning_rate,
        "seed": seed,
        "losses": [round(loss, 5) for loss in seen.losses],
        "step_s": round(seen.step_s, 3),
        **scores(model, tokenizer),
        "model_bytes": storage_bytes([*model.parameters(), *model.buffers()]),
        "adapter_bytes": storage_bytes(p for p in model.parameters() if p.requires_grad),
        "load_average": load_average,
    }


def kept(name: str, make) -> dict:
    """The result of `make()`, from build/record_qlora/ where it was made before."""
    path = KEPT / f"{name}.json"
    if not path.exists():
        print(f"{name} ...", flush=True)
        result = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(result), encoding="utf-8")
        path.with_suffix(".part").replace(path)
        shown = {key: value for key, value in result.items() if key != "losses"}
        print(f"{name}: {shown}", flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def main(names: list[str]) -> None:
    for name in names or RUNS:
        kept(name, lambda name=name: one_run(*RUNS[name]))
    base = kept("base", lambda: scores(*load_language_model()))
    done = [name for name in RUNS if (KEPT / f"{name}.json").exists()]
    record = {
        "command": "python benchmarks/record_qlora.py",
        "machine": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.system()} {platform.machine()}, torch {torch.__version__}",
        "recorded": time.strftime("%Y-%m-%d"),
        "settings": {
            "model": MODEL_NAME,
            "steps": STEPS,
            "batch_size": BATCH_SIZE,
            "r": R,
            "lora_alpha": LORA_ALPHA,
            "test_records": NUM_TEST,
        },
        "base": base,
        "runs": {name: kept(name, dict) for name in done},
    }
    OUTPUT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {OUTPUT.name} with {len(done)} of {len(RUNS)} runs")


if __name__ == "__main__":
    unknown = [name for name in sys.argv[1:] if name not in RUNS]
    if unknown:
        sys.exit(f"unknown run {', '.join(unknown)}: choose from {', '.join(RUNS)}")
    main(sys.argv[1:])
