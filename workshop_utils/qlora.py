"""QLoRA: LoRA beside a frozen base that is held in NF4. Taught in notebook 07.

    y = dequantize(codes) x + bias + scaling * B A x

The base's weight exists as packed codes and scales (quantization.py). It is made anew for each forward and once more for
each backward, and lives as long as one matrix product. Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized
LLMs" (arXiv:2305.14314), section 3, equation 5.

Everything that is quantised is held as uint8 parameters, the float32 scales too, byte by byte: `module.to(dtype)` and a
mixed-precision policy leave bytes alone, and `fully_shard` shards parameters. Before torch 2.13 it shards floats only:
there the same bytes are held as bfloat16 numbers (`quant_storage`, as bitsandbytes calls it), which nothing may cast.

Shapes: the weight W is [out, in], A is [r, in], B is [out, r]; N = out * in numbers in K blocks.
"""

from collections.abc import Sequence

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional as F

from workshop_utils.lora import LoRALinear, _check_no_lora, _check_settings, lora_layers
from workshop_utils.peft_format import shortened, target_module_names
from workshop_utils.quantization import NF4Tensor, dequantize_nf4, quantize_nf4

# what torch's fully_shard can shard: integers from torch 2.13 on
SHARDABLE_STORAGE = torch.uint8 if Version(torch.__version__) >= Version("2.13.0.dev0") else torch.bfloat16


class NF4Linear(nn.Module):
    """A frozen linear layer whose weight is held in NF4. x [..., in] to [..., out].

    Made from an nn.Linear, whose weight is not kept. Parameters, all without gradient:
    packed        uint8 [ceil(N / 2)], two codes to a byte
    absmax        uint8 [4 K], the bytes of float32; with double quantisation these instead:
    absmax_codes  uint8 [K]
    absmax_scale  uint8 [4 ceil(K / 256)], the bytes of float32
    absmax_mean   uint8 [4], the bytes of one float32
    bias          [out], as it was in the nn.Linear, or None
    `quant_storage` is the dtype that these bytes pretend to be, filled up with zeros to whole numbers of it. Any other
    than uint8 is for FSDP alone: it must be the dtype that FSDP's policy casts to (or there is no such policy), and
    `module.to(dtype)` turns the weight into noise.

    The product is computed in `compute_dtype`, or in the dtype of x; the result has the dtype of x.
    Raises TypeError where `linear` is no nn.Linear, and ValueError where quantize_nf4 does.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
    ):
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"NF4Linear is made from an nn.Linear, got {type(linear).__name__}")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.block_size, self.compute_dtype, self.quant_storage = block_size, compute_dtype, quant_storage
        quantized = quantize_nf4(linear.weight, block_size, double_quant)
        self.weight_dtype = quantized.dtype
        for name, tensor in quantized.tensors().items():
            self.register_parameter(name, _frozen(_as_bytes(tensor, quant_storage)))
        self.bias = None if linear.bias is None else _frozen(linear.bias.detach().clone())
        self.train(linear.training)

    @property
    def double_quant(self) -> bool:
        """Whether the absmax values are held in 8 bits."""
        return hasattr(self, "absmax_codes")

    def quantized(self) -> NF4Tensor:
        """The weight as it is held: views of this layer's parameters, no copies."""
        return _nf4_tensor(self._shape_and_settings(), *self._held())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out, in], made anew, in `dtype` or in the dtype that the nn.Linear's weight had."""
        return dequantize_nf4(self.quantized(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], in the dtype of x."""
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        y = _NF4MatMul.apply(x.to(dtype), bias, self._shape_and_settings(), *self._held())
        return y.to(x.dtype)

    def _held(self) -> list[Tensor]:
        names = (
            ("packed", "absmax_codes", "absmax_scale", "absmax_mean")
            if self.double_quant
            else ("packed", "absmax")
        )
        return [getattr(self, name) for name in names]

    def _shape_and_settings(self) -> tuple:
        return torch.Size((self.out_features, self.in_features)), self.weight_dtype, self.block_size

    def __getattr__(self, name: str):
        if name == "weight":
            raise AttributeError(
                "NF4Linear has no weight, only its codes: dequantize() makes one, merge_qlora(model) merges"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_size={self.block_size}, double_quant={self.double_quant}, compute_dtype={self.compute_dtype}, "
            f"quant_storage={self.quant_storage}"
        )


class _NF4MatMul(torch.autograd.Function):
    """x W^T + bias with W dequantised for the moment. Autograd keeps the codes, which are there anyway, and no x."""

    @staticmethod
    def forward(ctx, x, bias, shape_and_settings, *held):
        ctx.save_for_backward(*held)
        ctx.shape_and_settings = shape_and_settings
        return F.linear(x, dequantize_nf4(_nf4_tensor(shape_and_settings, *held), x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        grad_x, held = None, ctx.saved_tensors  # read once: activation checkpointing allows no second time
        if ctx.needs_input_grad[0]:
            quantized = _nf4_tensor(ctx.shape_and_settings, *held)
            grad_x = grad @ dequantize_nf4(quantized, grad.dtype)
        return grad_x, *[None] * (2 + len(held))  # nothing for the base: it is frozen


class QLoRALinear(LoRALinear):
    """A LoRALinear whose base_layer is an NF4Linear: y = dequantize(codes) x + bias + scaling * B A x.

    A and B are float32, whatever the base was, and the adapter's product is computed in their dtype; the result has the
    dtype of x. adapter_state_dict, load_adapter_state_dict and save_peft_adapter take it as any LoRALinear.
    `merge_qlora` takes the place of merge(), which a base without weight cannot do.
    Raises what LoRALinear and NF4Linear raise.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        *,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
    ):
        super().__init__(base_layer, r, lora_alpha, lora_dropout=lora_dropout, use_rslora=use_rslora)
        settings = {"block_size": block_size, "double_quant": double_quant, "quant_storage": quant_storage}
        self.base_layer = NF4Linear(base_layer, compute_dtype=compute_dtype, **settings)
        self.lora_A.float()
        self.lora_B.float()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out], in the dtype of x."""
        x_adapter = self.lora_dropout(x.to(self.lora_A.weight.dtype))
        y_adapter = self.lora_B(self.lora_A(x_adapter) * self.scaling)
        return self.base_layer(x) + y_adapter.to(x.dtype)

    def merge(self, keep_copy: bool = False) -> None:
        """Not possible in place: RuntimeError."""
        raise RuntimeError("a base in 4 bits cannot take a sum in place: use merge_qlora")

    def merged_linear(self, dtype: torch.dtype) -> nn.Linear:
        """A plain nn.Linear with dequantize(codes) + scaling * B A, added in float32 and rounded once, to `dtype`."""
        base, like_base = self.base_layer, {"device": self.lora_A.weight.device, "dtype": dtype}
        linear = nn.Linear(base.in_features, base.out_features, base.bias is not None, **like_base)
        with torch.no_grad():
            linear.weight.copy_(base.dequantize(torch.float32) + self.delta_weight())
            if base.bias is not None:
                linear.bias.copy_(base.bias)
        return linear.requires_grad_(False).train(self.training)

    def merged_nf4(self) -> NF4Linear:
        """An NF4Linear again: the sum rounded to 4 bits, with the settings of the base."""
        base = self.base_layer
        names = ("block_size", "double_quant", "quant_storage")
        settings = {name: getattr(base, name) for name in names}
        return NF4Linear(self.merged_linear(base.weight_dtype), compute_dtype=base.compute_dtype, **settings)


def apply_qlora(
    model: nn.Module,
    target_modules: str | Sequence[str],
    r: int,
    lora_alpha: float,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    quant_storage: torch.dtype = torch.uint8,
    **lora_kwargs,
) -> nn.Module:
    """Replace nn.Linear modules of `model` by QLoRALinear, in place, and freeze everything else. Returns `model`.

    `target_modules` and `lora_kwargs` (lora_dropout, use_rslora) are apply_lora's; "all-linear" leaves out the output
    layer of a language model, as PEFT does. Equal seeds give the A that apply_lora draws. The other settings are
    NF4Linear's; with quant_storage=SHARDABLE_STORAGE the model can be given to torch's fully_shard.
    Raises ValueError where apply_lora does, where a weight is tied to another parameter, and, naming the layer, where
    quantize_nf4 does.
    """
    _check_settings(r, lora_alpha, lora_kwargs.get("lora_dropout", 0.0))
    _check_no_lora(model)
    names = target_module_names(model, target_modules)
    _check_not_tied(model, names)
    model.requires_grad_(False)
    settings = {"block_size": block_size, "double_quant": double_quant, "compute_dtype": compute_dtype}
    settings |= {"quant_storage": quant_storage, **lora_kwargs}
    for name in names:
        linear = model.get_submodule(name)
        try:
            layer = QLoRALinear(linear, r, lora_alpha, **settings)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        model.set_submodule(name, layer.train(linear.training))
    return model


def merge_qlora(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Put the adapter of every QLoRALinear into its base, in place. Returns `model`; for a lone layer the new one.

    With `dtype`, plain nn.Linear layers come out: dequantize(codes) + scaling * B A, rounded once. This is what the
    adapter was trained beside, and the good way to merge. `dtype` None goes back to NF4Linear: the sum is rounded to
    4 bits again, and what an adapter adds is mostly smaller than a step between two levels.
    Do not merge into the weights that were quantised: the adapter has learned to make up for the base's rounding.
    Raises ValueError where the model holds no LoRA layers or some whose base is not in NF4.
    """
    layers = lora_layers(model)
    full = [name for name, layer in layers if not isinstance(layer, QLoRALinear)]
    if full:
        raise ValueError(f"the base of {shortened(full)} is not quantised: use merge_lora")
    for name, layer in layers:
        merged = layer.merged_nf4() if dtype is None else layer.merged_linear(dtype)
        if not name:
            return merged
        model.set_submodule(name, merged)
    return model


def _check_not_tied(model: nn.Module, names: Sequence[str]) -> None:
    """ValueError where the weight of one of the layers stands under another name too."""
    chosen = {id(model.get_submodule(name).weight): f"{name}.weight" for name in names}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if chosen.get(id(parameter), name) != name:
            raise ValueError(
                f"{chosen[id(parameter)]} is tied to {name}: in 4 bits it would be another weight, and take more room. "
                "Leave it out of target_modules."
            )


def _nf4_tensor(shape_and_settings: tuple, *held: Tensor) -> NF4Tensor:
    """An NF4Tensor from the tensors of an NF4Linear: packed and either absmax, or its codes, scale and mean."""
    shape, dtype, block_size = shape_and_settings
    blocks = -(-shape.numel() // block_size)
    scale_bytes = (4 * blocks,) if len(held) == 2 else (blocks, 4 * -(-blocks // 256), 4)
    sizes = (-(-shape.numel() // 2), *scale_bytes)
    packed, *scales = (_first_bytes(tensor, size) for tensor, size in zip(held, sizes, strict=True))
    if len(scales) == 1:
        return NF4Tensor(packed, shape, dtype, block_size, absmax=scales[0].view(torch.float32))
    codes, scale, mean = scales
    scale, mean = scale.view(torch.float32), mean.view(torch.float32).view(())
    return NF4Tensor(
        packed, shape, dtype, block_size, absmax_codes=codes, absmax_scale=scale, absmax_mean=mean
    )


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _as_bytes(tensor: Tensor, storage: torch.dtype) -> Tensor:
    """The bytes of a contiguous tensor, one-dimensional, as numbers of `storage`; zeros fill up the last one."""
    as_bytes = tensor.view(-1).view(torch.uint8)
    missing = -len(as_bytes) % storage.itemsize
    return (F.pad(as_bytes, (0, missing)) if missing else as_bytes).view(storage)


def _first_bytes(tensor: Tensor, size: int) -> Tensor:
    """The first `size` bytes, uint8, without a copy. RuntimeError where there are less: then they were cast."""
    as_bytes = tensor.view(torch.uint8)
    if len(as_bytes) < size:
        raise RuntimeError(
            f"{len(as_bytes)} bytes of a 4-bit layer have arrived as {tensor.dtype}, and it has {size}: they were cast on "
            "the way. quant_storage must be torch.uint8, or the dtype that FSDP's mixed-precision policy casts to"
        )
    return as_bytes[:size]
