"""What a plan needs to know of a model: parameters by kind and the shapes of one block. Notebook 08 uses it.

A model is built from its transformers config on the meta device: shapes and no memory, so 70 billion parameters take
a second. Kinds of parameters, which QLoRA and FSDP treat differently:

    embedding   tokens or image patches to vectors, positions included
    linear      weights of the linear layers in the blocks: what 4 bits and LoRA are for
    head        vectors to scores; 0 where it is tied to the embedding
    norm        all the rest: norms and biases, few

Shape letters: h features of a token (hidden), f features inside the MLP (intermediate), V scores (vocabulary or
classes).
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

# The models' own config files. Llama 1: Touvron et al. 2023, arXiv:2302.13971, table 2; Llama 2: arXiv:2307.09288;
# Llama 3: arXiv:2407.21783, table 3; ViT: Dosovitskiy et al. 2020, arXiv:2010.11929, table 1.
_LLAMA_SHAPES = {  # h, f, blocks, heads, heads of keys and values, V, tied
    "smollm2": (576, 1536, 30, 9, 3, 49152, True),  # SmolLM2-135M
    "llama-1b": (2048, 8192, 16, 32, 8, 128256, True),  # Llama 3.2 1B
    "llama-8b": (4096, 14336, 32, 32, 8, 128256, False),  # Llama 3.1 8B
    "llama-70b": (8192, 28672, 80, 64, 8, 128256, False),  # Llama 3.1 70B
    "llama-1-7b": (4096, 11008, 32, 32, 32, 32000, False),
    "llama-1-13b": (5120, 13824, 40, 40, 40, 32000, False),
    "llama-1-33b": (6656, 17920, 60, 52, 52, 32000, False),
    "llama-1-65b": (8192, 22016, 80, 64, 64, 32000, False),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000, False),
    "llama-2-70b": (8192, 28672, 80, 64, 8, 32000, False),
}
_VIT_SHAPES = {  # h, f, blocks, heads, side of a patch; 224 x 224 pixels, 1,000 classes
    "vit-b": (768, 3072, 12, 12, 16),
    "vit-l": (1024, 4096, 24, 16, 16),
    "vit-h": (1280, 5120, 32, 16, 14),
}
MODEL_NAMES = (*_LLAMA_SHAPES, *_VIT_SHAPES)


@dataclass(frozen=True)
class ModelSpec:
    """Shapes and parameter counts of a transformer whose blocks are alike. Counts are numbers, not bytes."""

    name: str
    hidden: int
    intermediate: int
    num_blocks: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_scores: int  # V: the vocabulary, or the classes
    linears: tuple[tuple[str, int, int], ...]  # of one block: (name, in, out)
    embedding_parameters: int
    linear_parameters: int  # weights, of all blocks
    head_parameters: int
    norm_parameters: int  # and biases, of the whole model
    block_norm_parameters: int  # of one block
    is_causal_lm: bool  # scores for each token; otherwise for each sequence
    is_gated: bool  # SwiGLU: two layers into the MLP, and their product
    has_rms_norm: bool
    fixed_length: int | None  # tokens of an image; None where the text says how long it is
    is_tied: bool
    image_numbers: int  # pixels times channels; 0 for text

    @property
    def num_parameters(self) -> int:
        """All parameters; a tied head counts once."""
        return sum(self.parameters_by_kind().values())

    @property
    def block_linear_parameters(self) -> int:
        """Weights of the linear layers of one block."""
        return sum(num_in * num_out for _, num_in, num_out in self.linears)

    def parameters_by_kind(self) -> dict[str, int]:
        """{"embedding": count, "linear": ..., "head": ..., "norm": ...}: their sum is the whole model."""
        return {
            "embedding": self.embedding_parameters,
            "linear": self.linear_parameters,
            "head": self.head_parameters,
            "norm": self.norm_parameters,
        }

    @classmethod
    def from_name(cls, name: str) -> "ModelSpec":
        """One of MODEL_NAMES. Raises ValueError with the choices for another name."""
        if name not in MODEL_NAMES:
            raise ValueError(
                f"unknown model {name!r}: choose one of {', '.join(MODEL_NAMES)}, or give the path of a config.json"
            )
        return _from_name(name)

    @classmethod
    def from_config(cls, config) -> "ModelSpec":
        """From a transformers config: the path of a config.json (or of its folder), or a config object.

        Raises ValueError where the file is no config, or the model is not of a kind that a plan can be made for.
        """
        if isinstance(config, (str, Path)):
            return _from_config(_read_config(Path(config)), str(config))
        return _from_config(config, config.model_type)

    @classmethod
    def from_model(cls, model: nn.Module, name: str) -> "ModelSpec":
        """From a transformers model, on any device. Linear layers that LoRA wraps are not found: give it the base."""
        config, blocks = model.config, _blocks_of(model)
        linears = tuple(
            (path.rpartition(".")[2], layer.in_features, layer.out_features)
            for path, layer in blocks[0].named_modules()
            if isinstance(layer, nn.Linear)
        )
        paths = dict(model.named_parameters())
        head = [path for path in paths if not path.startswith(tuple(_trunk_prefixes(model)))]
        in_blocks = {id(p) for p in blocks.parameters()}
        embedding = sum(
            p.numel() for path, p in paths.items() if "embed" in path.lower() and id(p) not in in_blocks
        )
        linear = len(blocks) * sum(num_in * num_out for _, num_in, num_out in linears)
        head_parameters = sum(paths[path].numel() for path in head)
        total = sum(p.numel() for p in paths.values())
        names = [linear_name for linear_name, _, _ in linears]
        heads = config.num_attention_heads
        return cls(
            name=name,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            num_blocks=len(blocks),
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            num_scores=getattr(config, "vocab_size", None) or config.num_labels,
            linears=linears,
            embedding_parameters=embedding,
            linear_parameters=linear,
            head_parameters=head_parameters,
            norm_parameters=total - embedding - linear - head_parameters,
            block_norm_parameters=sum(p.numel() for p in blocks[0].parameters()) - linear // len(blocks),
            is_causal_lm=hasattr(config, "vocab_size"),
            is_gated="gate_proj" in names or "gate_up_proj" in names,
            has_rms_norm=any("RMSNorm" in type(module).__name__ for module in blocks.modules()),
            fixed_length=_image_tokens(config),
            is_tied=bool(getattr(config, "tie_word_embeddings", False)) and hasattr(config, "vocab_size"),
            image_numbers=getattr(config, "num_channels", 0) * getattr(config, "image_size", 0) ** 2,
        )


@cache
def _from_name(name: str) -> ModelSpec:
    if name in _VIT_SHAPES:
        from transformers import ViTConfig

        hidden, intermediate, blocks, heads, patch = _VIT_SHAPES[name]
        config = ViTConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            patch_size=patch,
            num_labels=1000,
        )
        return _from_config(config, name)
    from transformers import LlamaConfig

    hidden, intermediate, blocks, heads, kv_heads, vocabulary, tied = _LLAMA_SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    return _from_config(config, name)


def _from_config(config, name: str) -> ModelSpec:
    """Build the model on the meta device and read it."""
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification

    factory = AutoModelForCausalLM if hasattr(config, "vocab_size") else AutoModelForImageClassification
    try:
        with torch.device("meta"):
            model = factory.from_config(config)
    except ValueError as error:
        raise ValueError(
            f"{name}: transformers builds no language model or image classifier from model_type {config.model_type!r}"
        ) from error
    return ModelSpec.from_model(model, name)


def _read_config(path: Path):
    from transformers import AutoConfig

    file = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(file.read_text())
        model_type = fields.pop("model_type")
        return AutoConfig.for_model(model_type, **fields)
    except FileNotFoundError:
        raise ValueError(f"no file {file}: give a model's name or the path of its config.json") from None
    except (KeyError, ValueError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file} is no transformers config that this version can read: {_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _blocks_of(model: nn.Module) -> nn.ModuleList:
    """The longest list of modules: the blocks. ValueError where they are not alike or hold no linear layers."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    kind = model.config.model_type
    if not lists:
        raise ValueError(f"a model of type {kind!r} has no list of blocks: no plan can be made for it")
    blocks = max(lists, key=len)
    shapes = {tuple(tuple(p.shape) for p in block.parameters()) for block in blocks}
    experts = getattr(model.config, "num_local_experts", None) or getattr(model.config, "num_experts", None)
    if len(shapes) > 1 or experts:
        raise ValueError(
            f"the blocks of a model of type {kind!r} differ, or hold experts: a plan needs dense blocks that are alike"
        )
    matrices = sum(p.numel() for p in blocks[0].parameters() if p.dim() > 1)
    weights = sum(m.weight.numel() for m in blocks[0].modules() if isinstance(m, nn.Linear))
    if weights < 0.99 * matrices:
        raise ValueError(f"the blocks of a model of type {kind!r} hold matrices that are no nn.Linear")
    return blocks


def _trunk_prefixes(model: nn.Module) -> list[str]:
    """Paths of the model without its head begin with these."""
    return [f"{model.base_model_prefix}."]


def _image_tokens(config) -> int | None:
    """Patches and the class token, of a config with image_size and patch_size."""
    if not (hasattr(config, "image_size") and hasattr(config, "patch_size")):
        return None
    return (config.image_size // config.patch_size) ** 2 + 1
