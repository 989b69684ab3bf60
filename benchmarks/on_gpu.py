"""Models with random weights on the GPU, and how time and memory are measured there: for record_gpu.py and tests/gpu.

Nothing here needs data, a fetched model or a network.
"""

import contextlib
import gc
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
from torch import nn

from workshop_utils.lora import apply_lora
from workshop_utils.model_specs import ModelSpec
from workshop_utils.qlora import SHARDABLE_STORAGE, apply_qlora

DEVICE = "cuda"
R, LORA_ALPHA, ROUNDS = 8, 16, 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-mixed": torch.bfloat16}
SHARDED = {  # what is changed: (checkpointing, offload)
    "nothing": (False, False),
    "checkpointing": (True, False),
    "offload": (False, True),
    "both": (True, True),
}


# ----------------------------------------------------------------------------- models


def llama(name: str, dtype: torch.dtype) -> nn.Module:
    """A Llama on the device, in the shape of one of the planner's models; its random weights depend on the seed alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    spec = ModelSpec.from_name(name)
    config = LlamaConfig(
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.num_blocks,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        vocab_size=spec.num_scores,
        tie_word_embeddings=spec.is_tied,
    )
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)  # 8 billion float32 numbers would be another 32 GB for a moment
        with torch.device(DEVICE):
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(default)


def prepared(name: str, method: str, precision: str, checkpointing: bool = False, **qlora) -> nn.Module:
    """The model as `method` trains it. Mixed: adapters in float32 beside a bfloat16 base."""
    model = llama(name, DTYPES[precision])
    torch.manual_seed(1)
    if method == "lora":
        apply_lora(model, "all-linear", R, LORA_ALPHA)
    elif method == "qlora":
        apply_qlora(model, "all-linear", R, LORA_ALPHA, **qlora)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def tokens(name: str, batch_size: int, length: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(ModelSpec.from_name(name).num_scores, (batch_size, length), generator=generator)
    return {"input_ids": ids.to(DEVICE), "labels": ids.to(DEVICE), "use_cache": False}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """As the planner assumes it: in place, a parameter at a time."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=False)


# ----------------------------------------------------------------------------- measuring


def peak_bytes(run) -> int:
    """Most bytes that torch's allocator had given out at a time during run(), what was there before included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def in_turns(contestants: dict, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """{name: seconds of each round}. Who begins changes; the first two rounds warm up and do not count."""
    names, times_s = list(contestants), {name: [] for name in contestants}
    for i in range(rounds + 2):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            torch.cuda.synchronize()
            began_s = time.perf_counter()
            contestants[name]()
            torch.cuda.synchronize()
            times_s[name].append(time.perf_counter() - began_s)
    return {name: times[2:] for name, times in times_s.items()}


def spread(times_s: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times_s, n=4)
    return {"median_s": median, "lower_quartile_s": low, "upper_quartile_s": high}


def empty() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def measured_step(model: nn.Module, batch: dict) -> dict:
    """A second step: gradients and moments are there from the first, as in accumulation."""
    optimizer = adamw(model)
    model(**batch).loss.backward()
    optimizer.step()
    return {
        "peak_bytes": peak_bytes(lambda: model(**batch).loss.backward()),
        "optimizer_peak_bytes": peak_bytes(optimizer.step),
        "held_bytes": torch.cuda.memory_allocated(),
    }


def step_of(model: nn.Module, batch: dict):
    """() -> the loss of one training step, before its update."""
    optimizer = adamw(model)

    def step():
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def sharded(name: str, method: str, change: tuple[bool, bool] | None) -> nn.Module:
    """In float32. None: without FSDP. Otherwise each block is a unit, and (checkpointing, offload) are on or off."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    checkpointing, offload = change or (False, False)
    storage = {"quant_storage": SHARDABLE_STORAGE} if method == "qlora" else {}
    model = prepared(name, method, "fp32", checkpointing, **storage)
    if change is not None:
        options = {"mesh": init_device_mesh(DEVICE, (1,))}
        options["offload_policy"] = (
            CPUOffloadPolicy(pin_memory=DEVICE == "cuda") if offload else OffloadPolicy()
        )
        for block in model.model.layers:
            fully_shard(block, **options)
        fully_shard(model, **options)
    return model


@contextlib.contextmanager
def group_of_one():
    """A process group of this process alone: nccl on a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
