"""What a training step computes and how long it sends: the second half of a plan. Notebook 08.

Operations: a weight takes 2 for each token in forward (one multiply, one add), 2 for the gradient by its input, and 2
for its own gradient, which a frozen weight does not have (Kaplan et al. 2020, arXiv:2001.08361, section 2.1; Hu et al.
2021 for what LoRA leaves out). Attention's two products with s keys add 4 s h for each token and block, half of that
where a token sees only those before it, and twice as much again in backward. Checkpointing runs the blocks' forward
again. Seconds of a collective: network.py's rings, none of it overlapped here.
"""

from workshop_utils.network import Link, all_gather_s, reduce_scatter_s, ring_all_reduce_s
from workshop_utils.plan_settings import PlanSettings

# Peak of dense arithmetic in bf16 (T4: fp16) with float32 sums, operations per second: NVIDIA's data sheets and
# architecture white papers (Turing, GA102, Ada, A100, H100 SXM).
GPU_PEAK_FLOPS_PER_S = {
    "T4": 65e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "A100": 312e12,
    "H100": 989e12,
}


def operations(settings: PlanSettings, adapter_parameters: int) -> float:
    """Operations of one step of one GPU."""
    spec, length = settings.spec, settings.length
    attended = length / 2 if spec.is_causal_lm else length
    attention = 4 * attended * spec.num_heads * spec.head_dim * spec.num_blocks
    head = spec.embedding_parameters if spec.is_tied else spec.head_parameters
    head_share = 1.0 if spec.is_causal_lm else 1 / length  # a classifier scores one token of an image
    weights = spec.linear_parameters + head * head_share
    forward = 2 * (weights + adapter_parameters) + attention
    backward = 2 * weights * (2 if settings.method == "full" else 1) + 4 * adapter_parameters + 2 * attention
    again = 2 * (spec.linear_parameters + adapter_parameters) + attention if settings.checkpointing else 0.0
    return settings.tokens * (forward + backward + again)


def communication_seconds(messages: list[tuple[str, float, int]], world_size: int, link: Link) -> float:
    """Seconds of (collective, bytes of the whole tensor, how often), one after another."""
    seconds = {
        "all_gather": all_gather_s,
        "reduce_scatter": reduce_scatter_s,
        "all_reduce": ring_all_reduce_s,
    }
    return sum(times * seconds[kind](size, world_size, link) for kind, size, times in messages)
