"""Notebook 08: wrong answers and the complaint each must provoke; right ones written differently."""

import torch
import torch.distributed as dist

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)

# 8.1 bytes_per_gpu


def bill(parameters, gradients, optimizer, activations):
    kinds = ("parameters", "gradients", "optimizer", "activations")
    return dict(zip(kinds, (parameters, gradients, optimizer, activations)))


def base_bytes(num_quantized, num_other):
    return num_quantized * NF4_BITS / 8 + 2 * num_other


def adam_for_the_base(num_quantized, num_other, num_adapter, activation_bytes, world_size):
    parameters = (base_bytes(num_quantized, num_other) + 4 * num_adapter) / world_size
    everything = num_quantized + num_other + num_adapter
    return bill(parameters, 4 * num_adapter / world_size, 8 * everything / world_size, activation_bytes)


def a_gradient_for_the_base(num_quantized, num_other, num_adapter, activation_bytes, world_size):
    parameters = (base_bytes(num_quantized, num_other) + 4 * num_adapter) / world_size
    gradients = 4 * (num_quantized + num_other + num_adapter) / world_size
    return bill(parameters, gradients, 8 * num_adapter / world_size, activation_bytes)


def shards_the_activations(num_quantized, num_other, num_adapter, activation_bytes, world_size):
    parameters = (base_bytes(num_quantized, num_other) + 4 * num_adapter) / world_size
    gradients, optimizer = 4 * num_adapter / world_size, 8 * num_adapter / world_size
    return bill(parameters, gradients, optimizer, activation_bytes / world_size)


def shards_the_base_alone(num_quantized, num_other, num_adapter, activation_bytes, world_size):
    parameters = base_bytes(num_quantized, num_other) / world_size + 4 * num_adapter
    return bill(parameters, 4 * num_adapter, 8 * num_adapter, activation_bytes)


def keeps_the_base_whole(num_quantized, num_other, num_adapter, activation_bytes, world_size):
    parameters = base_bytes(num_quantized, num_other) + 4 * num_adapter / world_size
    return bill(parameters, 4 * num_adapter / world_size, 8 * num_adapter / world_size, activation_bytes)


def shards_nothing(num_quantized, num_other, num_adapter, activation_bytes, world_size):
    parameters = base_bytes(num_quantized, num_other) + 4 * num_adapter
    return bill(parameters, 4 * num_adapter, 8 * num_adapter, activation_bytes)


def forgets_the_scales(num_quantized, num_other, num_adapter, activation_bytes, world_size):
    parameters = (num_quantized / 2 + 2 * num_other + 4 * num_adapter) / world_size
    return bill(parameters, 4 * num_adapter / world_size, 8 * num_adapter / world_size, activation_bytes)


def quantises_the_embedding(num_quantized, num_other, num_adapter, activation_bytes, world_size):
    parameters = (base_bytes(num_quantized + num_other, 0) + 4 * num_adapter) / world_size
    return bill(parameters, 4 * num_adapter / world_size, 8 * num_adapter / world_size, activation_bytes)


def embedding_in_float32(num_quantized, num_other, num_adapter, activation_bytes, world_size):
    exact = in_a_loop(num_quantized, num_other, num_adapter, activation_bytes, world_size)
    return exact | {"parameters": exact["parameters"] + 2 * num_other / world_size}


def counts_bits(num_quantized, num_other, num_adapter, activation_bytes, world_size):
    parameters = (num_quantized * NF4_BITS + 2 * num_other + 4 * num_adapter) / world_size
    return bill(parameters, 4 * num_adapter / world_size, 8 * num_adapter / world_size, activation_bytes)


def adapter_in_bf16(num_quantized, num_other, num_adapter, activation_bytes, world_size):
    parameters = (base_bytes(num_quantized, num_other) + 2 * num_adapter) / world_size
    return bill(parameters, 2 * num_adapter / world_size, 4 * num_adapter / world_size, activation_bytes)


def a_master_copy_too(num_quantized, num_other, num_adapter, activation_bytes, world_size):
    parameters = (base_bytes(num_quantized, num_other) + 4 * num_adapter) / world_size
    return bill(parameters, 4 * num_adapter / world_size, 12 * num_adapter / world_size, activation_bytes)


def the_total(*numbers):
    return sum(in_a_loop(*numbers).values())


def in_a_loop(num_quantized, num_other, num_adapter, activation_bytes, world_size):
    bits = {"codes": 4.0, "scales": 8 / 64, "scales of scales": 1 / 512}
    kinds = dict.fromkeys(("parameters", "gradients", "optimizer"), 0.0)
    kinds["parameters"] = sum(num_quantized * b for b in bits.values()) / 8 + 2 * num_other
    for kind, times in (("parameters", 1), ("gradients", 1), ("optimizer", 2)):
        kinds[kind] = (kinds[kind] + times * 4 * num_adapter) / world_size
    return {"activations": activation_bytes, **kinds}


def rounded_up(num_quantized, num_other, num_adapter, activation_bytes, world_size):
    exact = in_a_loop(num_quantized, num_other, num_adapter, activation_bytes, world_size)
    return {kind: -(-size // 1) if size > 1e6 else size for kind, size in exact.items()}


def the_bits_of_the_text(num_quantized, num_other, num_adapter, activation_bytes, world_size):
    exact = in_a_loop(num_quantized, num_other, num_adapter, activation_bytes, world_size)
    parameters = (num_quantized * 4.127 / 8 + 2 * num_other + 4 * num_adapter) / world_size
    return {kind: int(size) for kind, size in (exact | {"parameters": parameters}).items()}


# 8.2 gather_codes


def parts(gathered, codes):
    """[n * padded] to [n * codes]: the first codes of each rank's part."""
    return gathered.view(torch.uint8).view(dist.get_world_size(), -1)[:, : len(codes)].reshape(-1)


def padded(codes, multiple):
    return torch.nn.functional.pad(codes, (0, -len(codes) % multiple))


def hands_over_bytes(codes, param_dtype, all_gather):
    return all_gather(codes)


def casts_the_numbers(codes, param_dtype, all_gather):
    return all_gather(codes.to(param_dtype)).to(torch.uint8)


def always_float32(codes, param_dtype, all_gather):
    gathered = all_gather(padded(codes, 4).view(torch.float32))
    return gathered.view(torch.uint8)[: dist.get_world_size() * len(codes)]


def float32_and_back(codes, param_dtype, all_gather):
    return parts(all_gather(padded(codes, 4).view(torch.float32)).to(torch.float32), codes)


def always_bfloat16(codes, param_dtype, all_gather):
    return parts(all_gather(padded(codes, 2).view(torch.bfloat16)).to(torch.bfloat16), codes)


def forgets_the_padding(codes, param_dtype, all_gather):
    return all_gather(codes.view(param_dtype)).view(torch.uint8)


def leaves_the_padding_in(codes, param_dtype, all_gather):
    return all_gather(padded(codes, param_dtype.itemsize).view(param_dtype)).view(torch.uint8)


def cuts_the_padding_at_the_end_only(codes, param_dtype, all_gather):
    gathered = all_gather(padded(codes, param_dtype.itemsize).view(param_dtype)).view(torch.uint8)
    return gathered[: dist.get_world_size() * len(codes)]


def pads_what_needs_none(codes, param_dtype, all_gather):
    size = param_dtype.itemsize
    filled = torch.nn.functional.pad(codes, (0, size - len(codes) % size))
    return parts(all_gather(filled.view(param_dtype)), codes)


def gathers_its_own_only(codes, param_dtype, all_gather):
    all_gather(padded(codes, param_dtype.itemsize).view(param_dtype))
    return codes.repeat(dist.get_world_size())


def does_not_gather(codes, param_dtype, all_gather):
    return codes.clone()


def a_call_per_half(codes, param_dtype, all_gather):
    size = param_dtype.itemsize
    high, low = (all_gather(padded(half, size).view(param_dtype)) for half in (codes >> 4, codes & 15))
    return parts(high, codes) << 4 | parts(low, codes)


def two_ranks_for_ever(codes, param_dtype, all_gather):
    filled = padded(codes, param_dtype.itemsize)
    gathered = all_gather(filled.view(param_dtype)).view(torch.uint8)
    return gathered.view(2, -1)[:, : len(codes)].reshape(-1)


def returns_floats(codes, param_dtype, all_gather):
    return all_gather(padded(codes, param_dtype.itemsize).view(param_dtype))


def with_a_buffer(codes, param_dtype, all_gather):
    size = param_dtype.itemsize
    carrier = torch.zeros(-(-codes.numel() // size), dtype=param_dtype)
    carrier.view(torch.uint8)[: codes.numel()] = codes
    whole = all_gather(carrier).view(torch.uint8)
    step = len(carrier) * size
    return torch.cat([whole[i * step : i * step + codes.numel()] for i in range(dist.get_world_size())])


# 8.3 bytes_of_a_step


def gathers_once(units, world_size):
    return sum(f + t + t for f, t, _ in units) * (world_size - 1) / world_size


def reduces_what_is_frozen(units, world_size):
    return sum((f + t) * (g + 1) for f, t, g in units) * (world_size - 1) / world_size


def sends_to_itself_too(units, world_size):
    return sum((f + t) * g + t for f, t, g in units) * (world_size > 1)


def of_all_ranks(units, world_size):
    return sum((f + t) * g + t for f, t, g in units) * (world_size - 1)


def forgets_the_gradients(units, world_size):
    return sum((f + t) * g for f, t, g in units) * (world_size - 1) / world_size


def all_reduces_the_gradients(units, world_size):
    return sum((f + t) * g + 2 * t for f, t, g in units) * (world_size - 1) / world_size


def leaves_the_adapter_whole(units, world_size):
    return sum(f * g + 2 * t for f, t, g in units) * (world_size - 1) / world_size


def only_what_is_trained(units, world_size):
    return sum(2 * t for f, t, g in units) * (world_size - 1) / world_size


def three_times_everything(units, world_size):
    return 3 * sum(f + t for f, t, _ in units) * (world_size - 1) / world_size


def kind_by_kind(units, world_size):
    gathers = sum(g * f for f, _, g in units) + sum(g * t for _, t, g in units)
    reduces = sum(t for _, t, _ in units)
    return (world_size - 1) * gathers // world_size + (world_size - 1) * reduces // world_size


# 8.4 a configuration for 8B on two GPUs of 16 GB


def choice(strategy, method, largest, *, checkpointing=True, offload=False, batch_size=1):
    return {
        "strategy": strategy,
        "method": method,
        "checkpointing": checkpointing,
        "offload": offload,
        "batch_size": batch_size,
        "largest": largest,
    }


WRONG = {
    "8.1": [
        (adam_for_the_base, r"optimizer is .*The base is frozen"),
        (a_gradient_for_the_base, r"gradients is .*The base is frozen"),
        (shards_the_activations, r"activations is 750,000,000, expected 1,500,000,000.*divides none"),
        (shards_the_base_alone, r"parameters is .*The adapter is sharded too"),
        (keeps_the_base_whole, r"parameters is .*The frozen base is sharded too"),
        (shards_nothing, r"parameters is .*It is whole; FSDP divides it"),
        (forgets_the_scales, r"parameters is .*scales of the blocks are missing"),
        (quantises_the_embedding, r"parameters is .*Embeddings and norms are not quantised"),
        (counts_bits, r"parameters is .*Those are bits"),
        (embedding_in_float32, r"parameters is .*Embeddings and norms are bf16: 2 bytes"),
        (adapter_in_bf16, r"parameters is .*adapter is kept in float32"),
        (a_master_copy_too, r"optimizer is .*no other master copy"),
        (the_total, r"expected a dict with the keys"),
    ],
    "8.2": [
        (hands_over_bytes, r"takes floating-point tensors only, got uint8"),
        (casts_the_numbers, r"the budget is 64 .*view\(\) reads the same bytes"),
        (always_float32, r"have shape .*no bfloat16, so it was cast"),
        (float32_and_back, r"code \[\d+\] is .*all_gather casts to bfloat16"),
        (always_bfloat16, r"code \[\d+\] is .*all_gather casts to float16"),
        (forgets_the_padding, r"self.size|divisible"),
        (leaves_the_padding_in, r"the padding of each rank"),
        (cuts_the_padding_at_the_end_only, r"code \[7\] is .*that is padding. Each rank's stands behind"),
        (
            pads_what_needs_none,
            r"66 bytes handed over, the budget is 64 .*pad to the next whole number of bfloat16",
        ),
        (gathers_its_own_only, r"this rank's own codes 2 times"),
        (does_not_gather, r"you called all_gather 0 times, expected once"),
        (a_call_per_half, r"you called all_gather 2 times, expected once"),
        (two_ranks_for_ever, r"world of 1|world size 1|on each of 1 rank"),
        (returns_floats, r"you returned bfloat16, expected a uint8 tensor"),
    ],
    "8.3": [
        (gathers_once, r"again for its backward"),
        (reduces_what_is_frozen, r"What is frozen has no gradient"),
        (sends_to_itself_too, r"neither its own part to itself"),
        (of_all_ranks, r"neither its own part|what all ranks together send"),
        (forgets_the_gradients, r"counts once more"),
        (all_reduces_the_gradients, r"not all-reduced"),
        (leaves_the_adapter_whole, r"counts once more"),
        (only_what_is_trained, r"must be gathered"),
        (three_times_everything, r"3 times each unit"),
    ],
    "8.4": [
        (choice("fsdp", "full", "optimizer"), r"does not fit: .*optimizer .*Against optimizer"),
        (choice("fsdp", "lora", "parameters"), r"does not fit: .*Against parameters: fewer bits"),
        (
            choice("fsdp", "qlora", "activations", checkpointing=False),
            r"does not fit: .*Against activations: checkpointing",
        ),
        (choice("ddp", "lora", "parameters"), r"does not fit"),
        (choice("fsdp", "full", "temporary", offload=True), r"the host needs \d+ GB .* and has 64"),
        (choice("fsdp", "qlora", "activations"), r"activations are not the largest kind: .* logits"),
        (choice("fsdp", "lora", "logits", offload=True), r"it fits, .*times as long as the best"),
        (
            choice("ddp", "qlora", "logits", offload=True),
            r"the planner refuses these settings: offload is FSDP",
        ),
        (choice("single", "qlora", "logits"), r"strategy is 'single', expected one of ddp"),
        (choice("fsdp", "qlora", "memory"), r"largest is 'memory', expected one of parameters"),
        ({"strategy": "fsdp", "method": "qlora"}, r"missing: batch_size, checkpointing, largest, offload"),
        ("fsdp", r"expected a dict"),
    ],
}
RIGHT = {
    "8.1": [in_a_loop, rounded_up, the_bits_of_the_text],
    "8.2": [with_a_buffer],
    "8.3": [kind_by_kind],
    "8.4": [choice("ddp", "qlora", "logits"), choice("zero2", "qlora", "logits")],
}
