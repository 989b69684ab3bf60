"""Pushing an adapter and loading it back, with the real client and a Hub on this machine.

huggingface_hub reads its settings when it is imported, and pytest's process has imported it. So the client's half of
each test runs in one other process, which was started with the settings of the server: `client(function, ...)`.
"""

import contextlib
import io
import multiprocessing
import os
import socket
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from torch import nn

from hub_server import USER, HubServer
from workshop_utils import hub
from workshop_utils.lora import apply_lora, load_peft_adapter, lora_parameters, save_peft_adapter
from workshop_utils.models import MLP
from workshop_utils.peft_format import CONFIG_FILE, WEIGHTS_FILE

REPO = f"{USER}/adapter"


@dataclass
class Seen:
    """What a call in the client's process came to, and all that a person could have read of it."""

    result: object
    error: Exception | None
    text: str


@pytest.fixture(scope="module")
def server():
    with HubServer() as running:
        yield running


@pytest.fixture(scope="module")
def process(server, tmp_path_factory):
    environment = server.environment(tmp_path_factory.mktemp("hf_home"))
    with mock.patch.dict(os.environ, environment, clear=True):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context) as pool:
            yield pool


@pytest.fixture
def client(process, server):
    """`client(function, *args, token=...)` runs it in the client's process; the token is the right one otherwise."""
    server.came_back()
    server.repos.clear()
    server.large_files.clear()
    server.requests.clear()

    def call(function, *args, token=server.token):
        return process.submit(observe, token, function, *args).result(timeout=120)

    yield call
    server.came_back()


def observe(token, function, *args) -> Seen:
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    printed = io.StringIO()
    result = error = None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), no_waiting():
        try:
            result = function(*args)
        except Exception as caught:  # noqa: BLE001  the test looks at it
            error = caught
            caught.__traceback__ = caught.__traceback__.tb_next  # without this frame, which knows the token
            with_values = traceback.TracebackException.from_exception(caught, capture_locals=True)
            printed.write("".join(with_values.format()) + repr(caught.__context__) + repr(caught.__cause__))
            error.__traceback__ = None
    return Seen(result, error, printed.getvalue())


def no_waiting():
    """The client tries again five times, 23 seconds in all: here at once."""
    return mock.patch("time.sleep", lambda seconds: None)


def base():
    torch.manual_seed(0)
    return MLP(hidden=20)


def adapter(folder, seed=1):
    """An adapter of `base()` in `folder`, with its card; returns what the adapted model answers to `question()`."""
    model = apply_lora(base(), ["fc1", "fc3"], 2, 4)
    torch.manual_seed(seed)
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.2)
    save_peft_adapter(model, folder, base_model_name_or_path=None)
    hub.write_model_card(
        folder, base_model="the MLP of the notebook", description="8 or 9?", metrics={"right": 0.98}
    )
    return model(question()).detach()


def question():
    return torch.linspace(0, 1, 2 * 784).view(2, 784)


# what runs in the client's process, where peft and transformers are imported once


def run_the_card(kind, folder):
    if kind == "transformers":
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes))
        model.save_pretrained(folder / "base")
    else:
        model = MLP()
    save_peft_adapter(apply_lora(model, "all-linear", 1, 1), folder / "adapter", base_model_name_or_path=None)
    where = {"base_model": str(folder / "base"), "description": "", "metrics": {}}
    card = hub.write_model_card(folder / "adapter", **where).read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0].replace("OWNER/NAME", str(folder / "adapter"))
    names = {}
    exec(code, names)  # noqa: S102  our own template
    return f"{type(names['model']).__name__}" if len(code.splitlines()) == 6 else code


def answer_by_peft(repo_id, cache):
    import peft

    return peft.PeftModel.from_pretrained(base(), repo_id, cache_dir=cache)(question()).detach()


def push_by_peft(folder, repo_id):
    import peft

    peft.PeftModel.from_pretrained(base(), folder).push_to_hub(repo_id, private=True)


def answer_by_us(repo_id, cache):
    from huggingface_hub import snapshot_download

    return load_peft_adapter(base(), snapshot_download(repo_id, cache_dir=cache))(question()).detach()


def name_within(limit_s):
    with mock.patch.object(hub, "WHO_TIMEOUT_S", limit_s):
        began_s = time.monotonic()
        return hub.logged_in_as(), time.monotonic() - began_s


def push_within(limit_s, folder):
    with mock.patch.object(hub, "WHO_TIMEOUT_S", limit_s):
        return hub.push_adapter(folder, REPO)


def refused(seen, kind, message, *secrets):
    """One line in our words, and no secret in it, in the traceback with all its variables, or in what was printed."""
    assert type(seen.error) is kind, seen.text
    assert message in str(seen.error)
    assert "\n" not in str(seen.error)
    for secret in secrets:
        assert secret not in seen.text
        assert secret not in str(seen.error)


def test_pushed_by_us_loaded_by_peft_from_the_hub(client, server, tmp_path):
    expected = adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "notes.txt").write_text("not part of the adapter")
    seen = client(hub.push_adapter, tmp_path / "adapter", REPO)
    assert seen.result == f"{server.url}/{REPO}", seen.text
    assert server.repos[REPO].private
    assert server.repos[REPO].files == {
        name: (tmp_path / "adapter" / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE, "README.md")
    }
    assert len([request for request in server.requests if request.startswith("PUT /lfs/")]) == 1
    assert len([request for request in server.requests if request.endswith("/verify")]) == 1
    for load in (answer_by_peft, answer_by_us):
        loaded = client(load, REPO, tmp_path / f"cache of {load.__name__}")
        assert loaded.error is None, loaded.text
        torch.testing.assert_close(loaded.result, expected, atol=1e-6, rtol=1e-6)
    assert server.token not in seen.text


def test_pushed_by_peft_loaded_by_both(client, server, tmp_path):
    expected = adapter(tmp_path / "adapter")
    seen = client(push_by_peft, tmp_path / "adapter", REPO)
    assert seen.error is None, seen.text
    for load in (answer_by_peft, answer_by_us):
        loaded = client(load, REPO, tmp_path / f"cache of {load.__name__}")
        assert loaded.error is None, loaded.text
        torch.testing.assert_close(loaded.result, expected, atol=1e-6, rtol=1e-6)


def test_a_second_push_replaces_the_first(client, server, tmp_path):
    adapter(tmp_path / "adapter")
    client(hub.push_adapter, tmp_path / "adapter", REPO)
    expected = adapter(tmp_path / "adapter", seed=2)
    seen = client(hub.push_adapter, tmp_path / "adapter", REPO)
    assert seen.error is None, seen.text
    assert len(server.repos[REPO].commits) == 3
    torch.testing.assert_close(
        client(answer_by_us, REPO, tmp_path / "cache").result, expected, atol=1e-6, rtol=1e-6
    )


def test_the_name_behind_the_token(client, server):
    right = client(hub.logged_in_as)
    assert right.result == USER
    assert server.token not in right.text
    wrong = client(hub.logged_in_as, token="hf_wrongToken")
    assert (wrong.result, wrong.error, wrong.text) == (None, None, "")
    without = client(hub.logged_in_as, token=None)
    assert (without.result, without.error, without.text) == (None, None, "")


@pytest.mark.parametrize("token", ["hf_wrongToken", "hf_impossible\x01Token", "hf_unmöglich"])
def test_a_wrong_token_is_refused_and_never_shown(client, server, tmp_path, token):
    adapter(tmp_path)
    seen = client(hub.push_adapter, tmp_path, REPO, token=token)
    message = "cannot be a token" if "ö" in token else "does not accept your token"
    refused(seen, PermissionError, f"{message}. Run `hf auth login`", token, repr(token)[1:-1], token[:7])
    assert server.repos == {}


def test_a_server_that_repeats_the_token(client, server, tmp_path):
    adapter(tmp_path)
    server.repeats_token = True
    seen = client(hub.push_adapter, tmp_path, REPO)
    refused(seen, ValueError, "refuses the upload (400): ", server.token)
    assert "no: Bearer (token)" in str(seen.error)


def test_without_a_token(client, server, tmp_path):
    adapter(tmp_path)
    seen = client(hub.push_adapter, tmp_path, REPO, token=None)
    refused(seen, PermissionError, "you are not logged in to the Hugging Face Hub. Run `hf auth login`")
    assert server.requests == []


def test_somebody_else_s_name(client, server, tmp_path):
    adapter(tmp_path)
    seen = client(hub.push_adapter, tmp_path, "somebody/adapter")
    refused(seen, PermissionError, "you may not write to somebody/adapter", server.token)
    assert server.repos == {}


@pytest.mark.parametrize("repo_id", ["tester/a b", "a/b/c", "tester/--x"])
def test_an_impossible_name(client, server, tmp_path, repo_id):
    adapter(tmp_path)
    refused(
        client(hub.push_adapter, tmp_path, repo_id),
        ValueError,
        f"{repo_id!r} cannot be the name",
        server.token,
    )


@pytest.mark.parametrize("gone_at", ["/api/repos/create", "/preupload/", "^/lfs/", "/commit/"])
def test_the_server_goes_away_and_a_second_push_succeeds(client, server, tmp_path, gone_at):
    adapter(tmp_path)
    server.gone_at = gone_at
    seen = client(hub.push_adapter, tmp_path, REPO)
    refused(seen, ConnectionError, "push again when the network is back", server.token)
    assert server.gone
    assert all(not repo.files for repo in server.repos.values())
    server.came_back()
    again = client(hub.push_adapter, tmp_path, REPO)
    assert again.error is None, again.text
    assert server.repos[REPO].files[WEIGHTS_FILE] == (tmp_path / WEIGHTS_FILE).read_bytes()


def test_no_server_at_all(client, server, tmp_path):
    adapter(tmp_path)
    server.gone = True
    assert client(hub.logged_in_as).result is None
    refused(client(hub.push_adapter, tmp_path, REPO), ConnectionError, "cannot be reached", server.token)


def test_a_login_page_in_between(client, server, tmp_path):
    adapter(tmp_path)
    server.login_page = True
    assert client(hub.logged_in_as).result is None
    seen = client(hub.push_adapter, tmp_path, REPO)
    refused(seen, ConnectionError, "is not the Hugging Face Hub: a proxy or a login page?", server.token)


def test_a_server_that_never_answers(client, server, tmp_path):
    adapter(tmp_path)
    server.silent = True
    name, took_s = client(name_within, 0.3).result
    assert name is None
    assert took_s < hub.WHO_TIMEOUT_S
    seen = client(push_within, 0.3, tmp_path)
    refused(seen, ConnectionError, "did not answer within 0.3 seconds", server.token)


def test_nothing_is_pushed_that_is_no_adapter(client, server, tmp_path):
    refused(client(hub.push_adapter, tmp_path, REPO), FileNotFoundError, "no adapter_config.json in")
    adapter(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"half")
    refused(client(hub.push_adapter, tmp_path, REPO), ValueError, "is damaged or incomplete")
    assert server.requests == []


def test_the_card_says_what_it_is(tmp_path):
    from huggingface_hub import ModelCard

    adapter(tmp_path)
    path = hub.write_model_card(
        tmp_path,
        base_model="someone/base",
        description="Tells 8 from 9.",
        metrics={"accuracy": 0.98126, "parameters": 1684, "seeds | epochs": "5 | 2"},
    )
    card = ModelCard.load(path)
    assert card.data.to_dict() == {
        "base_model": "someone/base",
        "library_name": "peft",
        "tags": ["lora", "peft"],
    }
    for line in (
        "Tells 8 from 9.",
        "LoRA with r = 2, lora_alpha = 4, on `fc1`, `fc3`: 1,668 parameters.",
        "| accuracy | 0.9813 |",
        "| parameters | 1,684 |",
        r"| seeds \| epochs | 5 \| 2 |",
    ):
        assert line in card.text.splitlines(), card.text


@pytest.mark.parametrize("name", ["a few words", "/home/me/base", "mlp"])
def test_a_base_that_is_no_repository_stays_out_of_the_metadata(name, tmp_path):
    """The Hub refuses a card whose base_model is not the id of a repository."""
    adapter(tmp_path)
    card = hub.write_model_card(tmp_path, base_model=name, description="", metrics={}).read_text()
    assert "base_model" not in card
    assert name in card
    assert "Results" not in card


@pytest.mark.parametrize("kind", ["our MLP", "transformers"])
def test_the_code_of_the_card_runs(kind, client, tmp_path):
    seen = client(run_the_card, kind, tmp_path)
    assert seen.result == "PeftModel", seen.text


def test_the_server_listens_on_loopback_only(server):
    assert server.url.startswith("http://127.0.0.1:")
    with (
        pytest.raises(OSError),
        socket.create_connection(("127.0.0.2", int(server.url.rsplit(":", 1)[1])), timeout=1),
    ):
        pass
