"""What autograd keeps between the forward and the backward of a transformer: formulas, by layer. Notebook 08.

Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1) count what one block of GPT saves: s b h (34 + 5 a s / h)
bytes in 16 bits. Counted here in the same way, operation by operation, for what transformers runs today:

- attention by scaled_dot_product_attention or flash, which keeps no s x s matrix: queries, keys, values, the output,
  and 4 bytes for each token and head (Dao et al. 2022, arXiv:2205.14135, section 3.1, the softmax's statistics);
- dropout nowhere but before LoRA's A, where it was asked for;
- Llama's RMSNorm, which computes in float32 and saves that copy; SwiGLU's three large tensors (Shazeer 2020,
  arXiv:2002.05202) in place of one;
- a frozen linear layer, which needs its weight but not its input; LoRA beside it saves the input, and r numbers.

Letters: T tokens in the batch of one GPU, h features, f features inside the MLP, V scores, c bytes of a number in
the dtype of the arithmetic (4 or 2), r LoRA's.
"""

from dataclasses import dataclass

from workshop_utils.plan_settings import PlanSettings

LOSS_SAVED_BYTES = 4  # of each score: the log-softmax, in float32
LOSS_PEAK_BYTES = 12  # of each score, see `loss_bytes`


@dataclass(frozen=True)
class Trained:
    """What of a block is trained: `inputs_saved`, the linear layers whose input backward needs (all of them in full
    fine-tuning, those with an adapter under LoRA); `norms`, whether norms are; `r`, `dropout` and the bytes of a number
    in the adapters' arithmetic."""

    inputs_saved: tuple[str, ...]
    norms: bool
    r: int = 0
    dropout: bool = False
    adapter_bytes: int = 0


def block_bytes(settings: PlanSettings, trained: Trained) -> int:
    """Bytes that one block saves.

    RMSNorm: 4 h (the input in float32), c h if it is trained (the normalised input), 4. LayerNorm: c h and 8.
    Attention: c (queries + keys + values + output) + 4 heads. SwiGLU: 3 c f and, if the last layer's input is needed,
    c f. GELU: c f, and again c f. What a norm gives, c h, once for all layers that need it as input.

    LoRA, with a bytes of a number in the adapters' arithmetic: a r for each adapter. Where a is not c (float32 adapters
    in a bf16 model), each adapter saves an input of its own, cast, a for each number, and none is shared. So it is
    with dropout, which also saves a mask, 1 byte for each number.
    """
    spec, c = settings.spec, settings.number_bytes
    h, queries, keys = spec.hidden, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    norm = (4 * h + 4 + c * h * trained.norms) if spec.has_rms_norm else (c * h + 8)
    attention = c * (2 * queries + 2 * keys) + 4 * spec.num_heads
    mlp = c * spec.intermediate * (3 if spec.is_gated else 1)
    saved = [(name, num_in) for name, num_in, _ in spec.linears if name in trained.inputs_saved]
    if trained.r and (trained.dropout or trained.adapter_bytes != c):
        inputs = sum(num_in * (trained.adapter_bytes + trained.dropout) for _, num_in in saved)
    else:
        last = spec.linears[-1][0]  # its input is f wide
        sources = {_source(name, last) for name, _ in saved}
        inputs = c * (h * (len(sources & {"norm 1", "norm 2"})) + spec.intermediate * ("mlp" in sources))
    return settings.tokens * (
        2 * norm + attention + mlp + inputs + trained.adapter_bytes * trained.r * len(saved)
    )


def backward_extra_bytes(settings: PlanSettings) -> int:
    """Bytes of a block's backward beyond what it saved, where they are most: inside the MLP.

    SwiGLU: the gradients of product, activation and gate's partner exist while the input of the last layer is gone:
    2 c f more. GELU: gradients before and behind it, one saved tensor gone: c f more.
    """
    width = settings.spec.intermediate * settings.number_bytes
    return settings.tokens * width * (2 if settings.spec.is_gated else 1)


def saved_bytes(settings: PlanSettings, trained: Trained) -> dict[str, int]:
    """Bytes that one forward saves, by place: "blocks", "ends" (the image, final norm, input of the head), "scores".

    With checkpointing a block saves its input only, c h for each token; what it saves inside exists for one block
    at a time, later (`block_bytes`).
    """
    spec, tokens, c = settings.spec, settings.tokens, settings.number_bytes
    h = spec.hidden
    block = tokens * c * h if settings.checkpointing else block_bytes(settings, trained)
    norm = (4 * h + 4 + c * h * trained.norms) if spec.has_rms_norm else (c * h + 8)
    head_rows = tokens if spec.is_causal_lm else settings.batch_size
    ends = tokens * norm + (head_rows * c * h + settings.batch_size * c * spec.image_numbers) * trained.norms
    return {
        "blocks": spec.num_blocks * block,
        "ends": ends,
        "scores": num_scores(settings) * LOSS_SAVED_BYTES,
    }


def loss_bytes(settings: PlanSettings) -> int:
    """Bytes of the scores and their gradient where they are most, 12 V for each token of a language model.

    torch's cross entropy runs in float32: its log-softmax (saved), the gradient by it and the gradient by the scores
    exist at once, 4 bytes each. Chunked and fused losses avoid this.
    """
    return num_scores(settings) * LOSS_PEAK_BYTES


def num_scores(settings: PlanSettings) -> int:
    """Scores of one forward: V for each token of a language model, V for each image of a classifier."""
    spec = settings.spec
    return spec.num_scores * (settings.tokens if spec.is_causal_lm else settings.batch_size)


def _source(name: str, last: str) -> str:
    """Where a linear layer's input comes from. The input of attention's last layer is attention's output, saved anyway."""
    if name == last:
        return "mlp"
    if name in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
        return "norm 1"
    return "attention" if name == "o_proj" else "norm 2"
