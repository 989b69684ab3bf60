"""Random projections P from a subspace of d dimensions into all D parameters of a model. Notebook 06 teaches them.

    D  parameters      d  dimensions of the subspace      m  d padded to a power of two      K  blocks of m rows

P has D rows and d columns. Every column has norm 1 over all D rows together, so a step of length s in the subspace
moves the parameters by about s, whatever D is. Four kinds, and what each keeps (float32 and int64):

    dense     N(0, 1) in every entry                                                     4 D d bytes
    sparse    +1 or -1 in a share 1/sqrt(D) of the entries, else 0                       16 d sqrt(D) bytes
    fastfood  blocks H G Pi H B: random signs B, a permutation Pi, N(0, 1) in G          24 D bytes
    one_hot   each row has one entry, +1 or -1: a parameter reads one coordinate         8 D bytes

Dense, sparse and fastfood are those of Li et al. 2018 (arXiv:1804.08838, section 2 and S7; Fastfood is Le et al. 2013,
arXiv:1408.3060). One-hot is the idea of Uni-LoRA (arXiv:2506.00799), here with coordinates that are read equally often.

All is drawn on the CPU from the seed, by a generator of its own; `.to()` moves it. Draws of another torch version may
differ: `.fingerprint` tells. The signs of the draws go into it, not their last bits, which depend on the processor.
"""

import functools
import hashlib
import math

import torch
from torch import Tensor, nn

RADIX = 32
_EXACT_NORMS_UP_TO = 2**27  # entries of a cropped Fastfood block that are computed to learn its column norms


def make_projection(kind: str, D: int, d: int, seed: int) -> "Projection":
    """The projection of that kind, drawn from `seed`: "dense", "sparse", "fastfood" or "one_hot".

    Raises ValueError for another kind, or unless 1 <= d <= D.
    """
    if kind not in KINDS:
        raise ValueError(f"projection must be one of {', '.join(KINDS)}; got {kind!r}")
    for name, value in (("D", D), ("d", d), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
    if not 1 <= d <= D:
        raise ValueError(f"d must be from 1 to the number of parameters, D = {D:,}; got d = {d:,}")
    return KINDS[kind](D, d, seed)


class Projection(nn.Module):
    """P. Call it with theta_d [d] to get P theta_d [D]; `transposed(g)` [D] -> [d] is its gradient.

    The columns are those of `_times`, which a kind defines, divided by their norms.
    """

    kind: str

    def __init__(self, D: int, d: int, seed: int):
        super().__init__()
        self.D, self.d, self.seed = D, d, seed
        draws = self._draw(torch.Generator().manual_seed(_own_seed(seed)))
        self.fingerprint = _fingerprint(draws)
        self.register_buffer("scale", self._column_norms().reciprocal().float(), persistent=False)

    def forward(self, theta_d: Tensor) -> Tensor:
        if theta_d.shape != (self.d,):
            raise ValueError(f"theta_d must have shape [{self.d}], got {list(theta_d.shape)}")
        return _Product.apply(theta_d * self.scale, self._times, self._times_transposed)

    def transposed(self, g: Tensor) -> Tensor:
        """P^T g: g [D] -> [d]."""
        return _Product.apply(g, self._times_transposed, self._times) * self.scale

    def as_matrix(self) -> Tensor:
        """P itself [D, d]: for tests, and for looking at a small one."""
        columns = torch.eye(self.d, dtype=self.scale.dtype, device=self.scale.device)
        return torch.stack([self(column).detach() for column in columns], dim=1)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, D={self.D}, d={self.d}, seed={self.seed}"

    def _keep(self, **buffers: Tensor) -> None:
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)

    # A kind defines these. _times and _times_transposed are the product with the columns before they are scaled.

    def _draw(self, generator: torch.Generator) -> list[Tensor]:
        raise NotImplementedError

    def _column_norms(self) -> Tensor:
        raise NotImplementedError

    def _times(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _times_transposed(self, g: Tensor) -> Tensor:
        raise NotImplementedError


class Dense(Projection):
    """N(0, 1) in every entry: 598 MB for D = 199,210 and d = 750, read once forward and once backward."""

    kind = "dense"

    def _draw(self, generator):
        self._keep(matrix=torch.randn(self.D, self.d, generator=generator))
        return [self.matrix]

    def _column_norms(self):
        squares = sum(rows.double().square().sum(0) for rows in self.matrix.split(4096))
        return squares.sqrt()

    def _times(self, x):
        return self.matrix @ x

    def _times_transposed(self, g):
        return g @ self.matrix


class Sparse(Projection):
    """Each entry is +1 or -1 with probability 1/(2 sqrt(D)) each, otherwise 0, independently.

    Kept are row and column of the entries that are not 0. A sign is part of the column: x is read from [x, -x]. A
    parameter whose row has no entry never moves (with d = 750 and D = 199,210 that is 19% of them).
    """

    kind = "sparse"

    def _draw(self, generator):
        # Between two entries that are not 0, there is a geometrically distributed number of zeros.
        density, entries = min(1 / math.sqrt(self.D), 0.5), self.D * self.d
        at_once = int(entries * density + 8 * math.sqrt(entries * density)) + 8
        places = torch.zeros(0, dtype=torch.int64)
        while not len(places) or places[-1] < entries:
            gaps = torch.empty(at_once, dtype=torch.float64).geometric_(density, generator=generator)
            start = places[-1] if len(places) else -1
            places = torch.cat([places, start + gaps.cumsum(0).to(torch.int64)])
        places = places[places < entries]
        rows, columns = places // self.d, places % self.d
        empty = (torch.bincount(columns, minlength=self.d) == 0).nonzero().flatten()
        rows = torch.cat([rows, torch.randint(self.D, (len(empty),), generator=generator)])
        columns = torch.cat([columns, empty])
        minus = torch.randint(2, (len(rows),), generator=generator)
        self._keep(rows=rows, columns=columns + self.d * minus)
        return [rows, columns, minus]

    def _column_norms(self):
        return torch.bincount(self.columns % self.d, minlength=self.d).double().sqrt()

    def _times(self, x):
        return x.new_zeros(self.D).scatter_add_(0, self.rows, _with_minus(x).index_select(0, self.columns))

    def _times_transposed(self, g):
        sums = g.new_zeros(2 * self.d).scatter_add_(0, self.columns, g.index_select(0, self.rows))
        return sums[: self.d] - sums[self.d :]


class OneHot(Projection):
    """Each parameter reads one coordinate, with a random sign. P^T P is the identity: lengths are kept exactly.

    Every coordinate is read by D/d parameters, one more or less.
    """

    kind = "one_hot"

    def _draw(self, generator):
        slots = torch.randperm(self.D, generator=generator) % self.d
        minus = torch.randint(2, (self.D,), generator=generator)
        self._keep(columns=slots + self.d * minus)
        return [self.columns]

    def _column_norms(self):
        return torch.bincount(self.columns % self.d, minlength=self.d).double().sqrt()

    def _times(self, x):
        return _with_minus(x).index_select(0, self.columns)

    def _times_transposed(self, g):
        sums = g.new_zeros(2 * self.d).scatter_add_(0, self.columns, g)
        return sums[: self.d] - sums[self.d :]


class Fastfood(Projection):
    """Blocks H G Pi H B of m rows, one under the other; columns beyond d and rows beyond D are cut off.

    H is the Hadamard matrix, B random signs, Pi a permutation, G normal numbers: B, Pi and G are drawn for each block.
    In a whole block all columns have the norm sqrt(m) |G|. In the last, cropped one they differ and are computed, up to
    2**27 entries; beyond that they get the value expected, and all norms are 1 to about 1/sqrt(2 D).
    """

    kind = "fastfood"

    def _draw(self, generator):
        self.m = 1 << (self.d - 1).bit_length()
        self.K = -(-self.D // self.m)
        shape = (self.K, self.m)
        signs = torch.randint(2, shape, generator=generator) * 2.0 - 1.0
        permutation = torch.stack([torch.randperm(self.m, generator=generator) for _ in range(self.K)])
        normal = torch.randn(shape, generator=generator)
        self._keep(signs=signs, permutation=permutation, back=permutation.argsort(1), normal=normal)
        return [signs, permutation, normal]

    def _column_norms(self):
        squares = self.m * self.normal.double().square().sum(1)
        last_rows = self.D - (self.K - 1) * self.m
        cropped = squares[-1] * last_rows / self.m
        fewer = min(last_rows, self.m - last_rows)
        if 0 < fewer * self.m <= _EXACT_NORMS_UP_TO:
            kept = range(last_rows) if fewer == last_rows else range(last_rows, self.m)
            of_rows = self._last_block_squares(kept)
            cropped = of_rows if fewer == last_rows else squares[-1] - of_rows
        return (squares[:-1].sum() + cropped).expand(self.m)[: self.d].sqrt()

    def _last_block_squares(self, rows: range) -> Tensor:
        """The sum of squares of these rows of the last block, for each of its m columns."""
        total = torch.zeros(self.m, dtype=torch.float64)
        for some in torch.arange(rows.start, rows.stop).split(256):
            units = torch.nn.functional.one_hot(some, self.m).float()
            scaled = (_hadamard(units) * self.normal[-1])[:, self.back[-1]]
            total += _hadamard(scaled).double().square().sum(0)
        return total

    def _times(self, x):
        blocks = _hadamard(nn.functional.pad(x, (0, self.m - self.d)) * self.signs)
        blocks = _hadamard(blocks.gather(1, self.permutation) * self.normal)
        return blocks.flatten()[: self.D]

    def _times_transposed(self, g):
        blocks = nn.functional.pad(g, (0, self.K * self.m - self.D)).view(self.K, self.m)
        blocks = (_hadamard(blocks) * self.normal).gather(1, self.back)
        return (_hadamard(blocks) * self.signs).sum(0)[: self.d]


KINDS = {of_kind.kind: of_kind for of_kind in (Dense, Sparse, Fastfood, OneHot)}


def fast_hadamard_transform(x: Tensor) -> Tensor:
    """H x along the last dimension: x [..., n] -> [..., n], n a power of two, nothing divided by anything.

    H is Sylvester's matrix, in its natural order: H_2n = [[H_n, H_n], [H_n, -H_n]]. It is symmetric, so the gradient
    is H times the gradient. Applied twice it gives n x. Raises ValueError for another n.
    """
    n = x.shape[-1] if x.dim() else 0
    if n < 1 or n & (n - 1):
        raise ValueError(f"the last dimension must be a power of two, got shape {list(x.shape)}")
    return _Product.apply(x, _hadamard, _hadamard)


def _hadamard(x: Tensor) -> Tensor:
    """H x, without a gradient. A butterfly of adds and subtracts has log2(n) stages, each of which reads and writes
    all of x. H_32 as a matrix does five stages at once: more arithmetic, less memory traffic, 20 times as fast here.
    """
    n, done = x.shape[-1], 1
    y = x.reshape(-1, n)
    while done < n:
        radix = min(RADIX, n // done)
        H = _sylvester(radix, x.dtype, x.device)
        y = y.reshape(-1, radix) @ H if done == 1 else H @ y.reshape(-1, radix, done)
        done *= radix
    return y.reshape(x.shape)


@functools.cache
def _sylvester(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    H = torch.ones(1, 1, dtype=dtype, device=device)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


class _Product(torch.autograd.Function):
    """times(x), where `times` is linear and `transposed` is its transpose. The backward is the same with the two
    exchanged, so that it can be differentiated again.
    """

    @staticmethod
    def forward(x, times, transposed):
        return times(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.times, ctx.transposed = inputs

    @staticmethod
    def backward(ctx, g):
        return _Product.apply(g.contiguous(), ctx.transposed, ctx.times), None, None


def _with_minus(x: Tensor) -> Tensor:
    return torch.cat([x, -x])


def _own_seed(seed: int) -> int:
    """So that P shares no random numbers with a model made after torch.manual_seed(seed)."""
    return int.from_bytes(hashlib.sha256(f"projection {seed}".encode()).digest()[:7], "big")


def _fingerprint(draws: list[Tensor]) -> str:
    """A hash of what was drawn: of every k-th number where there are many."""
    digest = hashlib.sha256()
    for draw in draws:
        some = draw.flatten()[:: draw.numel() // 65_536 + 1]
        whole = (some > 0) if some.is_floating_point() else some
        digest.update(f"{tuple(draw.shape)}".encode())
        digest.update(whole.to(torch.int64).numpy().tobytes())
    return digest.hexdigest()
