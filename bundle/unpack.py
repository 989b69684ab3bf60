"""Data and model from a bundle into this user's cache, where they stay when the stick is gone. bootstrap.py runs it."""

import shutil
import sys
import tempfile
from pathlib import Path

from workshop_utils.data import FILES, DataError, cache_folder, read_folder
from workshop_utils.fetch import FetchError, fetch
from workshop_utils.language_model import MODEL_NAME
from workshop_utils.mnist_download import _publish


def bring_mnist(data: Path):
    """`data`/MNIST into the cache, unless a good one is there. Raises DataError or OSError, with nothing half-copied."""
    cache = cache_folder()
    try:
        read_folder(cache, "the cache")
        return
    except DataError:
        cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as work:
        raw = Path(work) / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for name in FILES:
            shutil.copyfile(data / "MNIST" / "raw" / name, raw / name)
        read_folder(Path(work), "the bundle")
        _publish(Path(work), cache)
    print(f"MNIST is ready: 70,000 images in {cache}")


def main(folder: Path) -> int:
    try:
        if (folder / "data").is_dir():
            bring_mnist(folder / "data")
        if (folder / "model").is_dir():
            fetch(folder / "model" / MODEL_NAME.rpartition("/")[2])
    except (DataError, FetchError, OSError) as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
