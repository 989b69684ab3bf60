"""What autograd keeps between the forward and the backward of a transformer: formulas, by layer. Notebook 08.

Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1) count what one block of GPT saves: s b h (34 + 5 a s / h)
bytes in 16 bits. Counted here in the same way, operation by operation, for what transformers runs today:

- attention by scaled_dot_product_attention or flash, which keeps no s x s matrix: queries, keys, values, the output,
  and 4 bytes for each token and head (Dao et al. 2022, arXiv:2205.14135, section 3.1, the softmax's statistics);
- no dropout, so no masks;
- Llama's RMSNorm, which computes in float32 and saves that copy; SwiGLU's three large tensors (Shazeer 2020,
  arXiv:2002.05202) in place of one;
- a frozen linear layer, which needs its weight but not its input; LoRA beside it saves the input, and r numbers.

Letters: T tokens in the batch of one GPU, h features, f features inside the MLP, V scores, c bytes of a number in
the dtype of the arithmetic (4 or 2), r LoRA's.
"""

from collections.abc import Collection

from workshop_utils.model_specs import ModelSpec

LOSS_SAVED_BYTES = 4  # of each score: the log-softmax, in float32
LOSS_PEAK_BYTES = 12  # of each score, see `loss_bytes`


def block_bytes(
    spec: ModelSpec, tokens: int, *, c: int, saves_input: Collection[str], trains_norms: bool, r: int
) -> int:
    """Bytes that one block saves for T = `tokens`.

    saves_input: names of the linear layers whose input is needed in backward: all in full fine-tuning, those with an
    adapter under LoRA. trains_norms: norms are trained. r: LoRA's, 0 in full fine-tuning.

    RMSNorm: 4 h (the input in float32), c h if it is trained (the normalised input), 4. LayerNorm: c h and 8.
    Attention: c (queries + 2 keys + output) + 4 heads. SwiGLU: 3 c f and, if the last layer's input is needed, c f.
    GELU: c f, and again c f. LoRA: c r for each adapter.
    """
    h, f = spec.hidden, spec.intermediate
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    norm = (4 * h + 4 + c * h * trains_norms) if spec.has_rms_norm else (c * h + 8)
    names = [name for name, _, _ in spec.linears]
    last = names[-1]
    into_attention = any(_in_attention(spec, name) and name in saves_input for name in names[:-1])
    into_mlp = any(name in saves_input for name in names if not _in_attention(spec, name) and name != last)
    attention = c * (2 * queries + 2 * keys) + 4 * spec.num_heads
    mlp = c * f * (3 if spec.is_gated else 1) + c * f * (last in saves_input)
    adapters = c * r * sum(name in saves_input for name in names) if r else 0
    return tokens * (2 * norm + c * h * (into_attention + into_mlp) + attention + mlp + adapters)


def backward_extra_bytes(spec: ModelSpec, tokens: int, *, c: int) -> int:
    """Bytes of a block's backward beyond what it saved, where they are most: inside the MLP.

    SwiGLU: the gradients of product, activation and gate's partner exist while the input of the last layer is gone:
    2 c f more. GELU: gradients before and behind it, one saved tensor gone: c f more.
    """
    return tokens * c * spec.intermediate * (2 if spec.is_gated else 1)


def saved_bytes(
    spec: ModelSpec, tokens: int, *, checkpointing: bool, batch_size: int, c: int, **of_a_block
) -> dict[str, int]:
    """Bytes that one forward saves, by place: "blocks", "ends" (final norm and input of the head), "scores".

    With checkpointing a block saves its input only, c h for each token; what it saves inside exists for one block
    at a time, later (`block_bytes`).
    """
    if checkpointing:
        blocks = spec.num_blocks * tokens * c * spec.hidden
    else:
        blocks = spec.num_blocks * block_bytes(spec, tokens, c=c, **of_a_block)
    h, trains = spec.hidden, of_a_block["trains_norms"]
    norm = (4 * h + 4 + c * h * trains) if spec.has_rms_norm else (c * h + 8)
    head_rows = tokens if spec.is_causal_lm else batch_size
    ends = tokens * norm + head_rows * c * h * trains
    return {"blocks": blocks, "ends": ends, "scores": num_scores(spec, tokens, batch_size) * LOSS_SAVED_BYTES}


def loss_bytes(spec: ModelSpec, tokens: int, batch_size: int) -> int:
    """Bytes of the scores and their gradient where they are most, 12 V for each token of a language model.

    torch's cross entropy runs in float32: its log-softmax (saved), the gradient by it and the gradient by the scores
    exist at once, 4 bytes each. Chunked and fused losses avoid this.
    """
    return num_scores(spec, tokens, batch_size) * LOSS_PEAK_BYTES


def num_scores(spec: ModelSpec, tokens: int, batch_size: int) -> int:
    """Scores of one forward: V for each token of a language model, V for each image of a classifier."""
    return spec.num_scores * (tokens if spec.is_causal_lm else batch_size)


def _in_attention(spec: ModelSpec, name: str) -> bool:
    """Whether a linear layer of a block reads what the first norm gives: queries, keys and values do."""
    return name in ("q_proj", "k_proj", "v_proj", "qkv_proj", "query", "key", "value", "qkv")
