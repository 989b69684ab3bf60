"""SmolLM2 as the cache holds it, and the network that stands in for it."""

import subprocess
import sys

import pytest
import torch

from workshop_utils import language_model
from workshop_utils.language_model import (
    MODEL_NAME,
    NUM_PARAMETERS,
    LanguageModelNotFetched,
    is_fetched,
    load_language_model,
)
from workshop_utils.stand_in import byte_tokenizer

needs_smollm2 = pytest.mark.skipif(
    not is_fetched(), reason="SmolLM2 is not in the cache: python -m workshop_utils fetch"
)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(language_model, "cache_folder", lambda: tmp_path)


def test_without_the_model_there_is_one_line_that_says_what_to_do(empty_cache):
    with pytest.raises(LanguageModelNotFetched) as raised:
        load_language_model()
    assert str(raised.value).endswith("run `python -m workshop_utils fetch`")
    assert "\n" not in str(raised.value)


def test_the_stand_in_runs_and_says_what_it_is(empty_cache, capsys):
    state = torch.get_rng_state()
    model, tokenizer = load_language_model(torch.bfloat16, stand_in=True)
    assert "stands in: its answers and figures mean nothing" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.get_submodule("model.layers.1.self_attn.k_proj").weight.shape == (32, 64)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert ids["input_ids"].shape[1] < out.shape[1] <= ids["input_ids"].shape[1] + 3
    again, _ = load_language_model(torch.bfloat16, stand_in=True)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("text", ["Vini bought 8 fresh cups.", 'é "x": [1]\n', " two  spaces "])
def test_bytes_come_back_as_they_were(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text


def test_importing_the_package_imports_no_large_library():
    modules = "language_model, fetch, hub_download, records, stand_in, wheel_download"
    code = (
        f"import sys; from workshop_utils import {modules}; "
        "print([name for name in ('transformers', 'peft', 'bitsandbytes') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@needs_smollm2
def test_smollm2_is_whole_and_knows_a_capital():
    model, tokenizer = load_language_model(torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMETERS
    assert model.name_or_path == MODEL_NAME and not model.training
    assert tokenizer.eos_token == "<|im_end|>"
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
