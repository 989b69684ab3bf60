"""How many dimensions a task needs: training in random subspaces of growing size. Notebook 06 uses it.

Method: Li et al. 2018 (arXiv:1804.08838, sections 2 and 3). d_int90 is the smallest d of a grid whose accuracy exceeds
90% of a baseline: of 1.0 (the "global" definition, for MNIST) or of what the same network reaches when all of it is
trained (the "local" one).

A run is one training at one d with one seed, or one of the whole network. Runs are independent, so ranks share them
out. A finished run is a small file, so a sweep that was interrupted goes on where it was.
"""

import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from workshop_utils.data import MNIST
from workshop_utils.projections import make_projection
from workshop_utils.ring import ring_all_reduce_
from workshop_utils.subspace import RandomSubspace
from workshop_utils.training import draw_batches, evaluate, train_step

GLOBAL_BASELINE = 1.0  # MNIST's; for CIFAR-10 the paper takes 0.5
SHARE = 0.9
DEFINITIONS = ("global", "local")
FULL_SPACE_LEARNING_RATE = 1e-3


def first_above(dims: Sequence[int], accuracy: Iterable[float], threshold: float) -> int | None:
    """The first d of the grid [n_dims] whose accuracy [n_dims] exceeds the threshold; None if none does."""
    return next((d for d, reached in zip(dims, accuracy, strict=True) if reached > threshold), None)


@dataclass(frozen=True)
class IntrinsicDimension:
    """What a sweep measured.

    dims       [n_dims] the grid, ascending
    seeds      [n_seeds]
    accuracy   [n_seeds, n_dims] of the trained subspaces, between 0 and 1
    baselines  [n_seeds] of the network trained as a whole
    D          its number of parameters
    settings   what all runs share
    seconds    what the runs took, added up (not the time from start to end, when ranks share them)
    """

    dims: list[int]
    seeds: list[int]
    accuracy: Tensor
    baselines: Tensor
    D: int
    settings: dict
    seconds: float

    @property
    def baseline(self) -> float:
        """The mean of the baselines."""
        return float(self.baselines.mean())

    def threshold(self, definition: str, share: float = SHARE) -> float:
        """0.9 (or another share) of the baseline that the definition means: "global" or "local"."""
        return share * self._baseline_of(definition, self.baseline)

    def d_int90(self, definition: str = "global") -> int | None:
        """The first d whose mean accuracy over the seeds exceeds the threshold, or None if no d of the grid does."""
        return first_above(self.dims, self.accuracy.mean(0).tolist(), self.threshold(definition))

    def d_int90_per_seed(self, definition: str = "global") -> list[int | None]:
        """The same for each seed [n_seeds] alone, against that seed's own baseline if the definition is "local"."""
        return [
            first_above(self.dims, row, SHARE * self._baseline_of(definition, own))
            for row, own in zip(self.accuracy.tolist(), self.baselines.tolist(), strict=True)
        ]

    def _baseline_of(self, definition: str, local: float) -> float:
        if definition not in DEFINITIONS:
            raise ValueError(f'the definition is "global" or "local", got {definition!r}')
        return GLOBAL_BASELINE if definition == "global" else local

    def to_json(self) -> str:
        """As JSON text, which `from_json` reads."""
        fields = asdict(self) | {"accuracy": self.accuracy.tolist(), "baselines": self.baselines.tolist()}
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> "IntrinsicDimension":
        fields = json.loads(text)
        for name in ("accuracy", "baselines"):
            fields[name] = torch.tensor(fields[name], dtype=torch.float64)
        return cls(**fields)


def measure_intrinsic_dimension(
    make_model: Callable[[], nn.Module],
    data: MNIST,
    dims: Sequence[int],
    *,
    projection: str = "one_hot",
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = 8,
    learning_rate: float = 0.1,
    batch_size: int = 128,
    score_on: str = "test",
    ranks=None,
    folder: str | Path | None = None,
    baseline: float | None = None,
) -> IntrinsicDimension:
    """Train in a subspace of each size in `dims` from each seed, and score every one of them.

    make_model     () -> nn.Module on images [B, 784], scores [B, 10]; called after torch.manual_seed(seed)
    projection     "dense", "sparse", "fastfood" or "one_hot"; also drawn from the seed
    epochs, learning_rate, batch_size   Adam at a constant rate on theta_d; the short last batch is dropped
    score_on       "test", or "train" for how much can be memorised
    ranks          what start_ranks gave: they share the runs out. None: one after the other, in this process
    folder         where finished runs are kept: a call after an interruption, or with a finer grid, repeats none
    baseline       the accuracy of the whole network, if known; otherwise it is trained from each seed, Adam 1e-3

    Raises ValueError for an empty or wrong grid, before anything is trained.
    """
    if score_on not in ("test", "train"):
        raise ValueError(f'score_on is "test" or "train", got {score_on!r}')
    make_projection(projection, D=1, d=1, seed=0)  # complains about another kind
    if not seeds:
        raise ValueError("at least one seed is needed")
    D = sum(p.numel() for p in _seeded(make_model, seeds[0]).parameters() if p.requires_grad)
    dims = sorted(set(dims))
    if not dims or not 1 <= dims[0] <= dims[-1] <= D:
        raise ValueError(f"dims must be a grid between 1 and D = {D:,}, got {dims}")
    settings = {
        "projection": projection,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "score_on": score_on,
        "images": len(data.train_labels),
    }
    runs = [(d, seed) for d in ([None] if baseline is None else []) + dims[::-1] for seed in seeds]
    made_in = nullcontext(folder) if folder is not None else tempfile.TemporaryDirectory()
    with made_in as place:
        names = _file_names(make_model, data, settings, runs, seeds)
        sweep = _Sweep(make_model, data, settings, runs, [Path(place) / name for name in names])
        table = sweep.results(ranks)
    column = dict(zip(runs, table.tolist(), strict=True))
    return IntrinsicDimension(
        dims=dims,
        seeds=list(seeds),
        accuracy=torch.tensor([[column[d, seed][0] for d in dims] for seed in seeds], dtype=torch.float64),
        baselines=torch.tensor(
            [column[None, seed][0] if baseline is None else baseline for seed in seeds], dtype=torch.float64
        ),
        D=D,
        settings=settings,
        seconds=float(table[:, 1].sum()),
    )


@dataclass
class _Sweep:
    """The runs, and the file that each one leaves when it has finished."""

    make_model: Callable
    data: MNIST
    settings: dict
    runs: list[tuple[int | None, int]]
    paths: list[Path]

    def results(self, ranks) -> Tensor:
        """Accuracy and seconds of every run [n_runs, 2]; what is missing is done first."""
        self.paths[0].parent.mkdir(parents=True, exist_ok=True)
        table = self._empty_table()
        missing = [i for i, path in enumerate(self.paths) if not path.exists()]
        for i in set(range(len(self.runs))) - set(missing):
            table[i] = _read(self.paths[i])
        with _bar(self.paths):
            if not missing:
                return table
            if ranks is None:
                return table + self._do_all(missing)
            return table + ranks.run(self.do_share, missing)[0]

    def do_share(self, missing: list[int]) -> Tensor:
        """On a rank: do every n-th of the missing runs, and add up what all ranks did [n_runs, 2]."""
        table = self._do_all(missing[dist.get_rank() :: dist.get_world_size()])
        ring_all_reduce_(table)
        return table

    def _do_all(self, indices: list[int]) -> Tensor:
        table = self._empty_table()
        for i in indices:
            table[i] = self._do(*self.runs[i])
            _write(self.paths[i], self.runs[i], self.settings, table[i])
        return table

    def _empty_table(self) -> Tensor:
        return torch.zeros(len(self.runs), 2, dtype=torch.float64)

    def _do(self, d: int | None, seed: int) -> Tensor:
        began_s = time.perf_counter()
        accuracy = _train_and_score(self.make_model, self.data, d, seed, **self.settings)
        return torch.tensor([accuracy, time.perf_counter() - began_s], dtype=torch.float64)


def _train_and_score(
    make_model,
    data: MNIST,
    d: int | None,
    seed: int,
    *,
    projection,
    epochs,
    learning_rate,
    batch_size,
    score_on,
    images,
) -> float:
    device = data.train_images.device
    model = _seeded(make_model, seed).to(device)
    if d is None:
        learning_rate = FULL_SPACE_LEARNING_RATE
    else:
        model = RandomSubspace(model, d, projection=projection, seed=seed)
    optimizer = torch.optim.Adam(
        (p for p in model.parameters() if p.requires_grad), learning_rate, fused=True
    )
    model.train()
    for batch in draw_batches(images, batch_size, epochs * (images // min(batch_size, images)), seed):
        batch = batch.to(device)
        train_step(model, optimizer, data.train_images.index_select(0, batch), data.train_labels[batch])
    if score_on == "train":
        return evaluate(model, data.train_images, data.train_labels)
    return evaluate(model, data.test_images, data.test_labels)


def _seeded(make_model: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_model()


# The files of finished runs


def _file_names(make_model, data: MNIST, settings: dict, runs, seeds) -> list[str]:
    """One name for each run: a hash of all that its result depends on, the initial weights and the data among it."""
    of_data = hashlib.sha256()
    for tensor in (data.train_labels, data.test_labels, data.train_images[::97], data.test_images[::97]):
        of_data.update(str(tuple(tensor.shape)).encode())
        of_data.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    of_model = {}
    for seed in seeds:
        model = _seeded(make_model, seed)
        of_model[seed] = hashlib.sha256(str(model).encode())
        for tensor in model.parameters():
            of_model[seed].update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    names = []
    for d, seed in runs:
        about = {
            "d": d,
            "seed": seed,
            "model": of_model[seed].hexdigest(),
            "data": of_data.hexdigest(),
        } | settings
        if d is None:
            del about["projection"], about["learning_rate"]
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        names.append(f"d{d or 'full'}_seed{seed}_{key[:16]}.json")
    return names


def _write(path: Path, run: tuple, settings: dict, result: Tensor) -> None:
    """A file appears under its name only when all of it is there."""
    accuracy, seconds = result.tolist()
    content = {"d": run[0], "seed": run[1], "accuracy": accuracy, "seconds": seconds} | settings
    unfinished = path.with_suffix(f".unfinished{os.getpid()}")
    unfinished.write_text(json.dumps(content), encoding="utf-8")
    unfinished.replace(path)


def _read(path: Path) -> Tensor:
    content = json.loads(path.read_text(encoding="utf-8"))
    return torch.tensor([content["accuracy"], content["seconds"]], dtype=torch.float64)


@contextmanager
def _bar(paths: list[Path]):
    """A progress bar of the files that exist. A thread looks for them: the runs may be on other processes."""
    over = threading.Event()

    def follow():
        done = sum(path.exists() for path in paths)
        with tqdm(total=len(paths), initial=done, unit="run", mininterval=0) as bar:
            last = False
            while not last:
                last = over.wait(0.25)  # once more after the end
                if finished := sum(path.exists() for path in paths) - bar.n:
                    bar.update(finished)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
