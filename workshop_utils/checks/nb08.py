"""Checks of notebook 08, FSDP and QLoRA. What communicates runs on real ranks, in several worlds.

n is the world size. Bytes of an answer are judged against formulas that are written here once more, or against what
the ranks were counted to send; 8.4 asks the planner (capstone.py).
"""

import torch
import torch.distributed as dist

from workshop_utils.checks import Wrong, capstone, exercise, expect_number
from workshop_utils.checks.replicas import in_worlds
from workshop_utils.collectives import ring_all_gather, ring_reduce_scatter
from workshop_utils.point_to_point import count_traffic

KINDS = ("parameters", "gradients", "optimizer", "activations")
NF4_BITS = (
    4 + 8 / 64 + 32 / (64 * 256)
)  # the codes, 8 bits for the scale of 64, a float32 for 256 such scales

# 8.1 Bytes per GPU


@exercise("8.1")
def check_bytes_per_gpu(answer):
    """`answer(num_quantized, num_other, num_adapter, activation_bytes, world_size)` is bytes by kind on one GPU."""
    cases = (
        (6_979_321_856, 1_050_939_392, 20_971_520, 1_500_000_000, 2),  # Llama 8B, r = 8
        (106_168_320, 28_346_688, 2_442_240, 90_000_000, 4),  # SmolLM2, r = 8
        (64_000, 1_000, 500, 7_000, 1),
    )
    for num_quantized, num_other, num_adapter, activation_bytes, n in cases:
        got = answer(num_quantized, num_other, num_adapter, activation_bytes, n)
        gpus = f"{n} GPU{'s' if n > 1 else ''}"
        call = f"{num_quantized:,} quantised, {num_other:,} other, {num_adapter:,} adapter numbers, {gpus}"
        if not isinstance(got, dict) or set(got) != set(KINDS):
            raise Wrong(f"{call}: you returned {got!r:.80}, expected a dict with the keys {', '.join(KINDS)}")
        base_bytes = num_quantized * NF4_BITS / 8 + 2 * num_other
        wanted = {
            "parameters": (base_bytes + 4 * num_adapter) / n,
            "gradients": 4 * num_adapter / n,
            "optimizer": 8 * num_adapter / n,
            "activations": activation_bytes,
        }
        for kind in KINDS:
            _expect_bytes(call, kind, got[kind], wanted[kind], (num_quantized, num_other, num_adapter, n))
    total_gb = sum(answer(*cases[0]).values()) / 1e9
    return f"all four kinds are right: Llama 8B on 2 GPUs, with 1.5 GB of activations, takes {total_gb:.1f} GB on each"


def _expect_bytes(call, kind, got, wanted, numbers):
    try:
        got = float(got)
    except (TypeError, ValueError):
        raise Wrong(f"{call}: {kind} is {got!r:.60}, expected {wanted:,.0f} bytes") from None
    if abs(got - wanted) <= 1e-4 * wanted:  # 4.127 bits will do
        return
    text = f"{call}: {kind} is {got:,.0f}, expected {wanted:,.0f}"
    num_quantized, num_other, num_adapter, n = numbers
    base = num_quantized + num_other
    reasons = _reasons(kind, wanted, num_quantized, num_other, num_adapter, n)
    for value, reason in reasons:
        if abs(got - value) <= 1e-4 * abs(value):
            raise Wrong(f"{text}. {reason}")
    if kind in ("gradients", "optimizer") and got > 2 * base / n:
        raise Wrong(f"{text}. The base is frozen: it has no gradient, so the optimizer holds nothing for it")
    raise Wrong(text)


def _reasons(kind, wanted, num_quantized, num_other, num_adapter, n):
    """(a wrong value, the mistake behind it), the likeliest first."""
    base_bytes, adapter_bytes = num_quantized * NF4_BITS / 8 + 2 * num_other, 4 * num_adapter
    if kind == "activations":
        return [(wanted / n, "Each GPU has activations of its own batch: sharding divides none of them")]
    whole = [(wanted * n, "It is whole; FSDP divides it by the number of GPUs")] if n > 1 else []
    if kind == "parameters":
        return whole + [
            ((base_bytes + adapter_bytes / 2) / n, "The adapter is kept in float32, 4 bytes a number"),
            (base_bytes / n + adapter_bytes, "The adapter is sharded too"),
            (adapter_bytes / n + base_bytes, "The frozen base is sharded too"),
            (base_bytes / n, "The adapter's numbers are parameters too"),
            ((num_quantized / 2 + 2 * num_other + adapter_bytes) / n, "The scales of the blocks are missing"),
            (
                (num_quantized * (4 + 32 / 64) / 8 + 2 * num_other + adapter_bytes) / n,
                "Those are the scales without double quantisation, half a bit for each number",
            ),
            (
                ((num_quantized + num_other) * NF4_BITS / 8 + adapter_bytes) / n,
                "Embeddings and norms are not quantised: 2 bytes each",
            ),
            (
                (num_quantized * NF4_BITS + 2 * num_other + adapter_bytes) / n,
                "Those are bits: 8 of them make a byte",
            ),
            ((base_bytes + 2 * num_other + adapter_bytes) / n, "Embeddings and norms are bf16: 2 bytes each"),
            ((2 * (num_quantized + num_other) + adapter_bytes) / n, "That is LoRA on a base in bf16"),
        ]
    return whole + [
        (wanted / 2, "The adapter is trained in float32: 4 bytes for a gradient, 4 + 4 for Adam's moments"),
        (wanted * 1.5, "The adapter is float32 itself: there is no other master copy"),
    ]


# 8.2 Four bits through a collective that casts


@exercise("8.2", needs_ranks=True)
def check_gather_codes(answer, ranks):
    """`answer(codes, param_dtype, all_gather)` is all ranks' codes, one after another, bit for bit."""
    for n, seen in in_worlds(ranks, _on_rank_gather, answer):
        for case, everyone in enumerate(zip(*seen, strict=True)):
            length, dtype = CASES[case]
            wanted = torch.cat([_codes(rank, length) for rank in range(n)])
            for rank, s in enumerate(everyone):
                where = f"({length} bytes on each of {n} ranks, param_dtype {_word(dtype)})"
                _expect_codes(s, wanted, rank, n, length, dtype, where)
    return f"bit for bit under bf16, fp16 and float32, in worlds of up to {len(ranks)} ranks, and no byte too many"


CASES = [(length, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32) for length in (64, 7, 1)]


def _codes(rank: int, length: int) -> torch.Tensor:
    """Every rank's own bytes; among them patterns that are NaN, infinite or too small as floats."""
    generator = torch.Generator().manual_seed(100 * length + rank)
    codes = torch.randint(0, 256, (length,), generator=generator, dtype=torch.uint8)
    codes[: 4 * (length // 8)] = torch.tensor([255, 255, 0, 1], dtype=torch.uint8).repeat(length // 8)
    return codes


def _on_rank_gather(answer) -> list[dict]:
    seen, rank = [], dist.get_rank()
    for length, dtype in CASES:
        carrier, codes = _CastingGather(dtype), _codes(rank, length)
        got = answer(codes, dtype, carrier)
        changed = not torch.equal(codes, _codes(rank, length))
        seen.append({"got": got, "sent": carrier.sent_bytes, "calls": carrier.calls, "changed": changed})
    dist.barrier()
    return seen


class _CastingGather:
    """What FSDP does to a parameter under mixed precision: floats only, cast to param_dtype, then gathered."""

    def __init__(self, dtype):
        self.dtype, self.calls, self.sent_bytes = dtype, 0, 0

    def __call__(self, tensor):
        self.calls += 1
        if not tensor.is_floating_point():
            raise TypeError(f"this all_gather takes floating-point tensors only, got {_word(tensor.dtype)}")
        flat = tensor.detach().reshape(-1).to(self.dtype)
        self.sent_bytes += flat.nbytes
        output = flat.new_empty(dist.get_world_size() * flat.numel())
        ring_all_gather(output.view(torch.uint8), flat.view(torch.uint8))  # bytes: no arithmetic on the way
        return output


def _expect_codes(s, wanted, rank, n, length, dtype, where):
    got, size = s["got"], dtype.itemsize
    if s["calls"] != 1:
        raise Wrong(f"rank {rank}: you called all_gather {s['calls']} times, expected once {where}")
    if s["changed"]:
        raise Wrong(f"rank {rank}: the codes that you were given were changed {where}")
    if not isinstance(got, torch.Tensor) or got.dtype != torch.uint8:
        kind = _word(got.dtype) if isinstance(got, torch.Tensor) else type(got).__name__
        raise Wrong(
            f"rank {rank}: you returned {kind}, expected a uint8 tensor of {n * length} codes {where}"
        )
    if got.numel() == -(-length // size) * size * n != wanted.numel():
        raise Wrong(
            f"rank {rank}: {got.numel()} codes came out, expected {wanted.numel()} {where}: the padding of each rank "
            "is still among them. Take the first codes of each rank's part"
        )
    if got.shape != wanted.shape:
        raise Wrong(
            f"rank {rank}: the codes have shape {list(got.shape)}, expected {list(wanted.shape)} {where}. If bytes "
            f"are missing or too many: what you handed over was no {_word(dtype)}, so it was cast and not copied"
        )
    if n > 1 and torch.equal(got, _codes(rank, length).repeat(n)):
        raise Wrong(
            f"rank {rank}: these are this rank's own codes {n} times, expected those of all ranks {where}"
        )
    if not torch.equal(got, wanted):
        wrong = (got != wanted).nonzero().flatten()
        with_padding = [torch.nn.functional.pad(_codes(r, length), (0, -length % size)) for r in range(n)]
        if torch.equal(got, torch.cat(with_padding)[: n * length]):
            raise Wrong(
                f"rank {rank}: code [{wrong[0]}] is {got[wrong[0]]}, expected {wanted[wrong[0]]} {where}: that is "
                "padding. Each rank's stands behind its own codes, so cut it out of each rank's part"
            )
        raise Wrong(
            f"rank {rank}: code [{wrong[0]}] is {got[wrong[0]]}, expected {wanted[wrong[0]]}; {len(wrong)} of "
            f"{len(wanted)} are wrong {where}. all_gather casts to {_word(dtype)}: only what is of that dtype "
            "already arrives unchanged"
        )
    budget = -(-length // size) * size
    if s["sent"] > budget:
        why = f"pad to the next whole number of {_word(dtype)}, and not at all if the codes fill one"
        if s["sent"] == length * size:
            why = "each byte was made a number of its own. view() reads the same bytes as another dtype, to() makes new ones"
        raise Wrong(
            f"rank {rank}: right codes, but {s['sent']} bytes handed over, the budget is {budget} {where}: {why}"
        )


def _word(dtype) -> str:
    return str(dtype).removeprefix("torch.")


# 8.3 What a step sends

UNITS = {  # (frozen bytes, trained bytes, gathers); all divide by 2 to 8
    "QLoRA": [(42_000, 8_400, 2), (42_000, 8_400, 2), (84_000, 0, 1)],
    "LoRA": [(168_000, 8_400, 2), (168_000, 8_400, 2), (84_000, 0, 1)],
    "full": [(0, 168_000, 2), (0, 168_000, 2), (0, 84_000, 1)],
}


@exercise("8.3", needs_ranks=True)
def check_bytes_of_a_step(answer, ranks):
    """`answer(units, world_size)`: bytes that each rank sends in a step; a unit is (frozen, trained, gathers)."""
    for n, counted in in_worlds(ranks, _on_rank_step, None, smallest=2):
        for name, num_bytes in counted[0].items():
            call = f"{name}, units {UNITS[name]}, world size {n}"
            got = answer(list(UNITS[name]), n)
            _explain_sent(call, got, num_bytes, UNITS[name], n)
            expect_number(got, num_bytes, name=f"{call}: your number of bytes")
    expect_number(answer([(42_000, 8_400, 2)], 1), 0, name="world size 1: your number of bytes")
    return f"full, LoRA and QLoRA: to the byte what each rank was counted to send, in worlds of up to {len(ranks)}"


def _on_rank_step(_answer) -> dict:
    """Send what a step sends: each unit gathered as often as it says, the trained part reduce-scattered."""
    n, counted = dist.get_world_size(), {}
    for name, units in UNITS.items():
        with count_traffic() as traffic:
            for frozen_bytes, trained_bytes, gathers in units:
                for _ in range(gathers):
                    _gather(frozen_bytes + trained_bytes, n)
                if trained_bytes:
                    gradients = torch.zeros(trained_bytes // 4)
                    ring_reduce_scatter(torch.zeros(len(gradients) // n), gradients)
        dist.barrier()
        counted[name] = traffic.bytes_sent
    return counted


def _gather(num_bytes: int, n: int) -> None:
    ring_all_gather(torch.zeros(num_bytes, dtype=torch.uint8), torch.zeros(num_bytes // n, dtype=torch.uint8))


def _explain_sent(call, got, counted, units, n):
    """Name the mistake behind a wrong number of bytes."""
    try:
        got = float(got)
    except (TypeError, ValueError):
        return
    if abs(got - counted) < 0.5:
        return
    share = (n - 1) / n
    both, trained = [(f + t, t, g) for f, t, g in units], sum(t for _, t, _ in units)
    gathered = sum(size * gathers for size, _, gathers in both)
    frozen_gathered = sum(f * g for f, _, g in units)
    reasons = [
        (
            share * (sum(size for size, _, _ in both) + trained),
            "A unit is gathered as often as it says, for its forward and again for its backward",
        ),
        (
            share * (gathered + sum(size for size, _, _ in both)),
            "What is frozen has no gradient: nothing to reduce",
        ),
        (
            gathered + trained,
            "A rank sends neither its own part to itself nor the others' for them: (n-1)/n",
        ),
        ((n - 1) * (gathered + trained), "That is what all ranks together send"),
        (
            share * gathered,
            "What is trained counts once more: gathered like all of its unit, and its gradient reduce-scattered",
        ),
        (
            share * (gathered + 2 * trained),
            "The gradients are reduce-scattered, not all-reduced: (n-1)/n of their bytes, once",
        ),
        (share * (frozen_gathered + trained), "The trained part is sharded, so it is gathered too"),
        (share * 2 * trained, "The frozen part has no gradient, but it is sharded, so it must be gathered"),
        (
            share * 3 * sum(size for size, _, _ in both),
            "That is 3 times each unit, as if all were trained and gathered twice",
        ),
    ]
    for value, reason in reasons:
        if abs(got - value) < 0.5:
            raise Wrong(f"{call}: your number of bytes is {got:,.0f}, counted were {counted:,}. {reason}")


# 8.4 Choose, and defend it


@exercise("8.4")
def check_configuration(answer):
    """`answer` is {"strategy", "method", "checkpointing", "offload", "batch_size", "largest"}: the planner judges."""
    return capstone.judge(answer)
