"""Plans beside what is there: small models, measured in this process and on two ranks.

Functions without `test_` in their name may run inside the ranks.
"""

import weakref
from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from workshop_utils import sub_world
from workshop_utils.lora import apply_lora
from workshop_utils.memory import held_bytes, measure_memory, plan_memory, record_activations
from workshop_utils.model_specs import ModelSpec
from workshop_utils.qlora import apply_qlora

STATES, ACTIVATIONS, PEAK = 0.05, 0.12, 0.05  # how far off a plan may be
BATCH, LENGTH = 2, 96
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-mixed": torch.bfloat16}
TARGETS = {"llama": "all-linear", "vit": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]}


# ----------------------------------------------------------------------------- small models


def make(kind: str, **changed):
    """A small Llama with grouped-query attention, or a small ViT."""
    from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    shapes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4} | changed
    if kind == "vit":
        shapes |= {"intermediate_size": 512, "image_size": 64, "patch_size": 8, "num_labels": 10}
        return ViTForImageClassification(ViTConfig(**shapes))
    shapes = {"intermediate_size": 352, "num_key_value_heads": 2, "vocab_size": 500} | shapes
    return LlamaForCausalLM(LlamaConfig(**{"tie_word_embeddings": False} | shapes))


@cache
def spec_of(kind: str, **changed) -> ModelSpec:
    return ModelSpec.from_model(make(kind, **changed), kind)


def prepare(kind: str, method: str, precision: str, *, checkpointing=False, targets=None, **changed):
    """The model as `method` trains it. Mixed: adapters in float32 beside a bf16 base."""
    model = make(kind, **changed).to(DTYPES[precision])
    targets = targets or TARGETS[kind]
    if method == "lora":
        apply_lora(model, targets, 8, 16)
    elif method == "qlora":
        apply_qlora(model, targets, 8, 16)
        if precision == "bf16":
            model.to(torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def batch_of(kind: str, precision: str, vocabulary=500, length=LENGTH) -> dict:
    if kind == "vit":
        pixels = torch.rand(BATCH, 3, 64, 64).to(DTYPES[precision])
        return {"pixel_values": pixels, "labels": torch.arange(BATCH)}
    tokens = torch.randint(0, vocabulary, (BATCH, length))
    return {"input_ids": tokens, "labels": tokens, "use_cache": False}


def plan_of(
    kind: str, method: str, precision: str, *, strategy="single", world_size=1, targets=None, **settings
):
    shapes = {name: settings.pop(name) for name in list(settings) if name.endswith(("_size", "_layers"))}
    return plan_memory(
        spec_of(kind, **shapes),
        strategy,
        world_size,
        method=method,
        precision=precision,
        batch_size=BATCH,
        length=LENGTH if kind == "llama" else None,
        target_modules=targets or "all-linear",
        **settings,
    )


def adam(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)


CASES = [
    ("llama", "full", "fp32"),
    ("llama", "full", "bf16"),
    ("llama", "lora", "fp32"),
    ("llama", "lora", "bf16"),
    ("llama", "qlora", "fp32"),
    ("llama", "qlora", "bf16-mixed"),
    ("vit", "full", "bf16"),
    ("vit", "lora", "fp32"),
    ("vit", "qlora", "fp32"),
]


# ----------------------------------------------------------------------------- beside one process


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("kind", "method", "precision"), CASES)
def test_states_and_saved_activations(kind, method, precision, checkpointing):
    model = prepare(kind, method, precision, checkpointing=checkpointing)
    optimizer = adam(model)
    with record_activations(model) as saved:
        loss = model(**batch_of(kind, precision)).loss
    loss.backward()
    optimizer.step()
    measured = measure_memory(model, optimizer)
    plan = plan_of(kind, method, precision, checkpointing=checkpointing)
    assert plan.parameters_bytes == pytest.approx(measured.parameters_bytes, rel=STATES)
    assert plan.gradients_bytes == pytest.approx(measured.gradients_bytes, rel=STATES)
    assert plan.optimizer_bytes == pytest.approx(measured.optimizer_bytes, rel=STATES)
    assert plan.saved_bytes == pytest.approx(saved.total_bytes, rel=ACTIVATIONS)
    assert plan.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["o_proj", "gate_proj"]])
def test_some_layers_with_an_adapter(targets):
    """What comes before the first adapter saves nothing, and is counted: one of 12 blocks at most."""
    model = prepare("llama", "lora", "fp32", targets=targets, num_hidden_layers=12)
    with record_activations(model) as saved:
        model(**batch_of("llama", "fp32"))
    plan = plan_of("llama", "lora", "fp32", targets=targets, num_hidden_layers=12)
    assert plan.saved_bytes == pytest.approx(saved.total_bytes, rel=ACTIVATIONS)


def test_tied_head_and_equal_heads():
    changed = {"tie_word_embeddings": True, "num_key_value_heads": 4}
    model = make("llama", **changed)
    spec = ModelSpec.from_model(model, "tied")
    assert (spec.is_tied, spec.head_parameters, spec.num_kv_heads) == (True, 0, 4)
    assert spec.num_parameters == sum(p.numel() for p in model.parameters())
    with record_activations(model) as saved:
        model(**batch_of("llama", "fp32"))
    plan = plan_memory(spec, precision="fp32", batch_size=BATCH, length=LENGTH)
    assert plan.saved_bytes == pytest.approx(saved.total_bytes, rel=ACTIVATIONS)


def test_dropout_before_the_adapters(monkeypatch):
    """As a GPU does it: one operation that saves a mask of one byte (a CPU's dropout saves floats)."""
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: torch.native_dropout(x, self.p, True)[0])
    model = make("llama").to(torch.bfloat16)
    apply_lora(model, "all-linear", 8, 16, lora_dropout=0.1)
    with record_activations(model.train()) as saved:
        model(**batch_of("llama", "bf16"))
    plan = plan_of("llama", "lora", "bf16", lora_dropout=True)
    assert plan.saved_bytes == pytest.approx(saved.total_bytes, rel=ACTIVATIONS)
    assert plan.saved_bytes > 1.2 * plan_of("llama", "lora", "bf16").saved_bytes


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that exist, and the most there were; the bytes that collectives gathered and scattered."""

    def __init__(self, tensors):
        super().__init__()
        self.sizes, self.now, self.peak, self.gathered, self.scattered = {}, 0, 0, 0, 0
        for tensor in tensors:
            self.see(tensor)

    def see(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            weakref.finalize(storage, self.forget, key)
            self.sizes[key] = 0
        self.now += size - self.sizes[key]
        self.sizes[key] = size
        self.peak = max(self.peak, self.now)

    def forget(self, key):
        self.now -= self.sizes.pop(key, 0)

    def __enter__(self):
        resize = self.resize = torch.UntypedStorage.resize_

        def watched(storage, size):  # how FSDP frees a whole unit
            key = storage._cdata
            resize(storage, size)
            if key in self.sizes:
                self.now += size - self.sizes[key]
                self.sizes[key] = size
                self.peak = max(self.peak, self.now)

        torch.UntypedStorage.resize_ = watched
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        name = str(operation)
        if "c10d._allgather" in name:
            self.gathered += tree_leaves(args[0])[0].nbytes
        if "c10d._reduce_scatter" in name:
            self.scattered += tree_leaves(args[1])[0].nbytes
        for tensor in tree_leaves((out, args)):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        return out


@pytest.mark.parametrize("vocabulary", [100, 3000])  # the fullest moment is in backward, or at the loss
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("method", "precision"), [("full", "bf16"), ("lora", "fp32"), ("lora", "bf16"), ("qlora", "fp32")]
)
def test_the_fullest_moment(method, precision, checkpointing, vocabulary):
    length = 384  # so many tokens that what passes is more than what stays
    model = prepare("llama", method, precision, checkpointing=checkpointing, vocab_size=vocabulary)
    optimizer, batch = adam(model), batch_of("llama", precision, vocabulary, length)
    model(**batch).loss.backward()  # from here on the gradients are there, as in accumulation
    optimizer.step()
    state = [p for held in optimizer.state.values() for p in held.values()]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    live = LiveBytes([*model.parameters(), *model.buffers(), *state, *gradients])
    with live:
        model(**batch).loss.backward()
    plan = plan_memory(
        spec_of("llama", vocab_size=vocabulary),
        method=method,
        precision=precision,
        batch_size=BATCH,
        length=length,
        checkpointing=checkpointing,
    )
    assert plan.total_bytes == pytest.approx(live.peak, rel=PEAK)


def test_eight_bit_moments():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = prepare("llama", "full", "fp32", hidden_size=256)
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters())
    model(**batch_of("llama", "fp32")).loss.backward()
    optimizer.step()
    held = [value for state in optimizer.state.values() for key, value in state.items() if "qmap" not in key]
    measured = held_bytes(value for value in held if isinstance(value, torch.Tensor))
    plan = plan_memory(spec_of("llama", hidden_size=256), precision="fp32", optimizer="adamw-8bit")
    assert plan.optimizer_bytes == pytest.approx(measured, rel=STATES)  # norms stay in float32: few


# ----------------------------------------------------------------------------- beside FSDP


def sharded(method: str, precision: str, world_size: int):
    """The small Llama under torch's fully_shard after one step, its batch, and the bytes of its shards by kind."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (world_size,))
    model = prepare("llama", method, precision, checkpointing=True)
    mixed = precision == "bf16-mixed"
    if mixed and method == "full":
        model.float()  # the shards are the masters
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer, batch = adam(model), batch_of("llama", precision)
    model(**batch).loss.backward()
    optimizer.step()
    state = [tensor for held in optimizer.state.values() for tensor in held.values()]
    held = {
        "parameters": [p.to_local() for p in model.parameters()],
        "gradients": [p.grad.to_local() for p in model.parameters() if p.grad is not None],
        "optimizer": [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in state],
    }
    return model, batch, held


def shards_and_traffic(method: str, precision: str):
    """Bytes of this rank's shards by kind, and what a step's collectives gathered and scattered."""
    with sub_world(2) as inside:
        if not inside:
            return None
        model, batch, held = sharded(method, precision, 2)
        with LiveBytes([]) as live:
            model(**batch).loss.backward()
        return {kind: held_bytes(tensors) for kind, tensors in held.items()}, live.gathered, live.scattered


SHARDED = [("full", "fp32"), ("full", "bf16-mixed"), ("lora", "fp32"), ("qlora", "fp32")]


@pytest.mark.parametrize(("method", "precision"), SHARDED)
def test_fully_shard_on_two_ranks(ranks5, method, precision):
    sizes, gathered, scattered = ranks5.run(shards_and_traffic, method, precision)[0]
    plan = plan_of("llama", method, precision, strategy="fsdp", world_size=2, checkpointing=True)
    for kind, size in sizes.items():
        assert plan.by_kind()[kind] == pytest.approx(size, rel=STATES), kind
    assert plan.traffic_bytes == pytest.approx((gathered + scattered) / 2, rel=0.01)


@pytest.fixture
def lone_group(tmp_path):
    """A process group of this process alone: FSDP gathers and frees its units all the same."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("method", "precision"), SHARDED)
def test_the_fullest_moment_of_fully_shard(lone_group, method, precision):
    model, batch, held = sharded(method, precision, 1)
    with LiveBytes([tensor for tensors in held.values() for tensor in tensors]) as live:
        model(**batch).loss.backward()
    plan = plan_of("llama", method, precision, strategy="fsdp", checkpointing=True)
    assert plan.total_bytes == pytest.approx(live.peak, rel=0.15)
