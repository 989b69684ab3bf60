"""4-bit layers under torch's fully_shard: not a bit changed, the losses of one process, and where bits do change.

On worlds of 1 to 3 ranks, with a tiny Llama whose weights are random. Ours: workshop_utils.qlora.QLoRALinear; the
library's: bitsandbytes' Linear4bit with PEFT's adapters. Functions without `test_` in their name run inside the ranks.
"""

import copy
import logging
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from workshop_utils import RankError, sub_world
from workshop_utils.qlora import SHARDABLE_STORAGE, apply_qlora

WORLD_SIZES = [1, 2, 3]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


# ----------------------------------------------------------------------------- inside the ranks


def tiny_llama():
    """Two blocks, weights from one seed; 65 features in the MLP's middle, so that shards are uneven."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 65, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=61, num_hidden_layers=2, tie_word_embeddings=True, **sizes)
    return LlamaForCausalLM(config).train()


def ours(compute_dtype=None, quant_storage=SHARDABLE_STORAGE):
    model = tiny_llama()
    torch.manual_seed(1)
    settings = {"compute_dtype": compute_dtype, "quant_storage": quant_storage}
    return apply_qlora(model, "all-linear", r=4, lora_alpha=8, **settings)


def librarys(compute_dtype=None, quant_storage=SHARDABLE_STORAGE):
    """bitsandbytes' layers, PEFT's adapters."""
    logging.disable(logging.WARNING)  # bitsandbytes' first import speaks of kernels
    import bitsandbytes
    import peft

    warnings.filterwarnings("ignore")
    model = tiny_llama()
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name != "lm_head":
            layer = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, quant_type="nf4",
                compute_dtype=compute_dtype or FP32, quant_storage=quant_storage,
            )  # fmt: skip
            layer.load_state_dict(linear.state_dict())
            model.set_submodule(name, layer.to("cpu"))  # quantises
    model.is_loaded_in_4bit = True
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))


MAKE = {"ours": ours, "bitsandbytes": librarys}


def shard(model, **options):
    """Each block of the Llama, and the rest, as units of torch's fully_shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore")
    options["mesh"] = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def as_bytes(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def whole(model):
    """{name: bytes} of all parameters, gathered."""
    model.reshard()
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: as_bytes(p.to_local()) for name, p in model.named_parameters()})
    return {name: torch.cat([shards[name] for shards in everyone]) for name in everyone[0]}


def train(model, optimizer, batches, parts):
    """Mean losses of one process that takes the parts one after another, or of ranks that take one each."""
    losses = []
    for tokens in batches:
        total = 0.0
        for part in parts(tokens):
            loss = model(input_ids=part, labels=part, use_cache=False).loss / len(parts(tokens))
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def beside_one_process(n, which, storage=SHARDABLE_STORAGE, low=False):
    """Of n ranks: changed frozen bytes, the largest difference of losses and of adapters, trained ones' movement."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    with sub_world(n) as inside:
        if not inside:
            return None
        one, sharded = (MAKE[which](BF16 if low else None, storage) for _ in range(2))
        before = {name: as_bytes(p).clone() for name, p in sharded.named_parameters()}
        if low:
            policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32)
            shard(sharded, mp_policy=policy)
        else:
            shard(sharded)
        generator = torch.Generator().manual_seed(5)
        batches = [torch.randint(61, (6, 9), generator=generator) for _ in range(3)]
        models = {"one": one, "sharded": sharded}
        parts = {"one": lambda x: x.chunk(n), "sharded": lambda x: x.chunk(n)[dist.get_rank() :][:1]}
        losses = {}
        for name, model in models.items() if not low else [("sharded", sharded)]:
            trained = [p for p in model.parameters() if p.requires_grad]
            losses[name] = train(model, torch.optim.SGD(trained, 0.5), batches, parts[name])
        for loss in losses["sharded"]:
            dist.all_reduce(loss)
        after = whole(sharded)
        frozen = [name for name, p in sharded.named_parameters() if not p.requires_grad]
        found = {
            "changed": [name for name in frozen if not torch.equal(after[name], before[name])],
            "moved": sum(not torch.equal(after[name], before[name]) for name in after),
            "codes": sum(after[name].numel() for name in frozen if "embed" not in name),
        }
        if not low:
            pairs = zip(losses["one"], losses["sharded"], strict=True)
            found["loss"] = max(abs((a - b / n).item()) for a, b in pairs)
            adapters = {name: p.detach() for name, p in one.named_parameters() if p.requires_grad}
            found["adapter"] = max(
                (after[name].view(FP32) - p.reshape(-1)).abs().max().item() for name, p in adapters.items()
            )
        return found


class Holder(nn.Module):
    """Packed codes as a parameter of some storage dtype; the forward says which bytes arrived."""

    def __init__(self, codes, storage):
        super().__init__()
        self.packed = nn.Parameter(codes.view(storage), requires_grad=False)

    def forward(self):
        return as_bytes(self.packed).clone()


def arrived(n, storage, param_dtype):
    """(bytes that arrived, share of them that changed) on this rank."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    with sub_world(n) as inside:
        if not inside:
            return None
        codes = torch.randint(0, 256, (960,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        holder = shard(Holder(codes, storage), mp_policy=MixedPrecisionPolicy(param_dtype=param_dtype))
        got = holder()
        length = min(len(got), len(codes))
        return len(got), (got[:length] != codes[:length]).float().mean().item()


def held_by_each(n):
    """Bytes of parameters on this rank, and of the whole model in one process."""
    with sub_world(n) as inside:
        if not inside:
            return None
        one, sharded = ours(), shard(ours())
        return sum(p.to_local().nbytes for p in sharded.parameters()), sum(p.nbytes for p in one.parameters())


def bnb_forward(quant_storage, param_dtype):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    with sub_world(2) as inside:
        if not inside:
            return None
        model = librarys(compute_dtype=BF16, quant_storage=quant_storage)
        tokens = torch.arange(18).view(2, 9)
        with torch.no_grad():
            expected = copy.deepcopy(model)(input_ids=tokens).logits
        shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=param_dtype))
        got = model(input_ids=tokens).logits.float()
        return ((got - expected).norm() / expected.norm()).item()


# ----------------------------------------------------------------------------- tests


@pytest.mark.parametrize("which", MAKE)
@pytest.mark.parametrize(("n", "storage"), [*((n, SHARDABLE_STORAGE) for n in WORLD_SIZES), (2, BF16)])
def test_not_a_bit_of_the_base_changes_and_losses_are_those_of_one_process(ranks5, which, n, storage):
    for found in ranks5.run(beside_one_process, n, which, storage)[:n]:
        assert found["changed"] == []
        assert found["moved"] == 28, "every adapter matrix is trained: 2 blocks, 7 layers, A and B"
        assert found["codes"] > 0
        assert found["loss"] < 1e-5 and found["adapter"] < 1e-5
        if n <= 2:  # two addends have one order
            assert found["adapter"] == 0


@pytest.mark.parametrize("which", MAKE)
@pytest.mark.parametrize("storage", dict.fromkeys([SHARDABLE_STORAGE, BF16]))
def test_not_a_bit_changes_under_bf16_mixed_precision(ranks5, which, storage):
    for found in ranks5.run(beside_one_process, 2, which, storage, low=True)[:2]:
        assert found["changed"] == []
        assert found["moved"] == 28


@pytest.mark.parametrize("n", WORLD_SIZES)
def test_each_rank_holds_its_share_of_codes_and_scales(ranks5, n):
    sizes = ranks5.run(held_by_each, n)[:n]
    assert sum(held for held, _ in sizes) == sizes[0][1]
    assert max(held for held, _ in sizes) < sizes[0][1] / n * 1.15  # torch cuts rows: shards differ by one


TRAP = [  # storage, param_dtype, bytes that arrive of 960, or None where they arrive unchanged
    (torch.uint8, BF16, None),
    (BF16, BF16, None),
    (FP32, None, None),
    (FP32, FP32, None),
    (FP32, BF16, 480),
    (BF16, FP32, 1920),
    (FP16, BF16, 960),
]


@pytest.mark.parametrize(("storage", "param_dtype", "num_bytes"), TRAP)
def test_the_trap_codes_stored_as_another_float_than_param_dtype_are_cast(
    ranks5, storage, param_dtype, num_bytes
):
    if storage == torch.uint8 != SHARDABLE_STORAGE:
        pytest.skip("fully_shard takes bytes from torch 2.13 on")
    for n in (2, 3):
        for got, changed in ranks5.run(arrived, n, storage, param_dtype)[:n]:
            assert got == (num_bytes or 960)
            assert changed == 0 if num_bytes is None else changed > 0.95


def test_the_trap_in_bitsandbytes(ranks5):
    """With another size it fails, with the same size it computes, and what it computes is nothing like the model."""
    assert max(ranks5.run(bnb_forward, BF16, BF16)[:2]) < 0.05
    assert min(ranks5.run(bnb_forward, FP16, BF16)[:2]) > 0.5
    with pytest.raises(RankError, match="invalid for input of size"):
        ranks5.run(bnb_forward, FP32, BF16)
