"""Bytes of the states of a model, of its parts while they are whole, and of what is sent. Notebook 08.

Bytes of one trained parameter: itself, its gradient, Adam's part.

    fp32        4 + 4 + 8
    bf16        2 + 2 + 4   (torch's Adam keeps its moments in the parameter's dtype)
    bf16-mixed  2 + 2 + 12  in DDP and ZeRO-1 and 2: the optimizer holds the float32 master (Rajbhandari et al. 2020,
                            arXiv:1910.02054, figure 1)
                4 + 4 + 8   in FSDP, whose shards are the master (torch's MixedPrecisionPolicy), and for adapters

A frozen one: c bytes, or in NF4 4 bits and its scales, 8/64 + 32/(64 * 256) = 0.127 bits with double quantisation,
32/64 without (Dettmers et al. 2023, arXiv:2305.14314, section 3). Embedding, head and norms are not quantised.
"""

from workshop_utils.plan_settings import OPTIMIZERS, PlanSettings


class PlanSizes:
    """Bytes under one choice of settings. c is the arithmetic's bytes of a number, n the GPUs."""

    def __init__(self, settings: PlanSettings):
        self.settings, self.spec = settings, settings.spec
        self.n, self.c = settings.world_size, settings.number_bytes
        self.is_full, self.is_nf4 = settings.method == "full", settings.method == "qlora"
        self.is_fsdp = settings.strategy == "fsdp"
        self.adapters = self.spec.num_blocks * sum(
            settings.r * (num_in + num_out)
            for name, num_in, num_out in self.spec.linears
            if name in settings.target_modules
        )
        self.trained = self.spec.num_parameters if self.is_full else self.adapters
        own = 4 if settings.is_mixed else self.c
        moment = OPTIMIZERS[settings.optimizer]
        moments = 2 * (own if moment is None else moment)
        if settings.is_mixed and self.is_full and not self.is_fsdp:
            self.own, self.gradient, self.adam = 2, 2, 4 + moments
        else:
            self.own, self.gradient, self.adam = own, own, moments
        scale_bits = (8 / 64 + 32 / (64 * 256)) if settings.double_quant else 32 / 64
        self.weight = 0.5 if self.is_nf4 else self.c  # of a frozen weight of a block
        self.scales = scale_bits / 8 if self.is_nf4 else 0.0  # for each such weight

    # what stays

    def resident(self) -> dict[str, float]:
        """Parameters, gradients and optimizer state that stay on one GPU (or, offloaded, on the host for it)."""
        parameters = self.trained * self.own
        if not self.is_full:
            others = self.spec.num_parameters - self.spec.linear_parameters
            parameters += self.spec.linear_parameters * self.weight + others * self.c
            parameters += self._scales_sharded(self.spec.linear_parameters)
        return {
            "parameters": parameters / self._divided("fsdp") + self.scales_whole(),
            "gradients": self.trained * self.gradient / self._divided("zero2", "fsdp"),
            "optimizer": self.trained * self.adam / self._divided("zero1", "zero2", "fsdp"),
        }

    def scales_whole(self) -> float:
        """Scales that are no parameters, so that neither FSDP nor its offload knows of them."""
        return 0.0 if self.settings.shard_scales else self.spec.linear_parameters * self.scales

    # what is whole for a while

    def block_whole(self) -> float:
        """One block as it is gathered: weights (4-bit codes stay codes), norms, adapters in the arithmetic's dtype."""
        weights = self.spec.block_linear_parameters
        others = self.spec.block_norm_parameters + self.adapters / self.spec.num_blocks
        return (
            weights * (self.weight if self.is_nf4 else self.c)
            + self._scales_sharded(weights)
            + others * self.c
        )

    def root_whole(self) -> float:
        """What is in no block: embedding, head, final norm. torch keeps FSDP's root whole until backward has ended."""
        spec = self.spec
        in_blocks = spec.linear_parameters + spec.num_blocks * spec.block_norm_parameters
        return (spec.num_parameters - in_blocks) * self.c

    def temporary_at_loss(self) -> float:
        """FSDP's root."""
        return self.root_whole() if self.is_fsdp else 0.0

    def temporary_in_backward(self) -> float:
        """While a block is in backward.

        The largest weight out of its 4 bits; under FSDP also the root, this block and the prefetched one (with offload
        their shards too, on the way in), the block's gradient before it is scattered, in the arithmetic's dtype and
        in the wire's, and the root's gradient.
        """
        dequantised = max(i * o for _, i, o in self.spec.linears) * self.c if self.is_nf4 else 0
        if not self.is_fsdp:
            return dequantised
        blocks = 2 * self.block_whole() * (1 + (1 / self.n if self.settings.offload else 0))
        root_gradient = self.root_whole() if self.is_full else 0.0
        gradient = self._block_trained() * (self.c + self.gradient) + root_gradient
        return dequantised + self.root_whole() + blocks + gradient

    # what is sent

    def messages(self) -> list[tuple[str, float, int]]:
        """(collective, bytes of the whole tensor, how often) of one step."""
        gradients = self.trained * self.gradient
        if self.settings.strategy == "ddp":
            return [("all_reduce", gradients, 1)]
        if self.settings.strategy in ("zero1", "zero2"):
            return [("reduce_scatter", gradients, 1), ("all_gather", self.trained * self.own, 1)]
        if not self.is_fsdp:
            return []
        blocks, block_gradient = self.spec.num_blocks, self._block_trained() * self.gradient
        return [
            ("all_gather", self.root_whole(), 1),
            ("all_gather", self.block_whole(), 2 * blocks),
            ("reduce_scatter", block_gradient, blocks),
            ("reduce_scatter", gradients - blocks * block_gradient, 1),
        ]

    def traffic(self) -> float:
        """Bytes that one GPU sends in a step: (n-1)/n of each gather and scatter, twice that of an all-reduce (rings)."""
        share = (self.n - 1) / self.n
        return sum(
            size * times * share * (2 if kind == "all_reduce" else 1) for kind, size, times in self.messages()
        )

    def host_traffic(self) -> float:
        """With offload, bytes between one GPU and the host in a step: shards down for each gather, gradients up."""
        if not self.settings.offload:
            return 0.0
        gathered = sum(size * times for kind, size, times in self.messages() if kind == "all_gather")
        return (gathered + self.trained * self.gradient) / self.n

    def _scales_sharded(self, weights: float) -> float:
        return weights * self.scales if self.settings.shard_scales else 0.0

    def _block_trained(self) -> float:
        """Trained parameters of one block."""
        if self.is_full:
            return self.spec.block_linear_parameters + self.spec.block_norm_parameters
        return self.adapters / self.spec.num_blocks

    def _divided(self, *strategies: str) -> int:
        """n where one of these strategies is at work, else 1."""
        return self.n if self.settings.strategy in strategies else 1
