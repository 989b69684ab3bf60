"""Sentences and records: what is held out, which tokens are learned, and that a model can learn them."""

import json

import pytest
import torch
from torch.nn import functional as F

from workshop_utils import records
from workshop_utils.lora import apply_lora, lora_parameters
from workshop_utils.records import (
    IGNORED,
    MAX_NEW_TOKENS,
    answer,
    as_batch,
    exact_match,
    fine_tune,
    generate_answers,
    make_records,
    mean_loss,
    parsed,
    prompt,
    training_batches,
)
from workshop_utils.stand_in import tiny_language_model


@pytest.fixture
def tiny():
    return tiny_language_model()


# the records


def test_what_the_test_asks_was_never_trained():
    train, test, new = (
        make_records(3000, split=split, seed=0) for split in ("train", "test", "new_template")
    )
    for values, count in (
        (lambda pairs: {record["name"] for _, record in pairs}, 48),
        (lambda pairs: {record["item"].split()[1] for _, record in pairs}, 24),
    ):
        assert values(train).isdisjoint(values(test)) and values(test) == values(new)
        assert len(values(train)) == count and len(values(test)) == 12
    assert all(sentence.startswith("We charged") for sentence, _ in new)
    assert not any(sentence.startswith("We charged") for sentence, _ in train + test)


def test_every_sentence_holds_its_record():
    for split in records.SPLITS:
        for sentence, record in make_records(500, split=split, seed=3):
            assert list(record) == ["name", "item", "quantity", "price"]
            assert all(str(value) in sentence for value in record.values())


def test_equal_seeds_give_equal_records_and_others_do_not():
    assert make_records(20, seed=1) == make_records(30, seed=1)[:20]
    assert make_records(20, seed=1) != make_records(20, seed=2)
    with pytest.raises(ValueError, match="split must be one of train, test, new_template, got 'dev'"):
        make_records(1, split="dev", seed=0)


# the batches


def test_only_the_answer_and_its_end_are_learned(tiny):
    _, tokenizer = tiny
    pairs = make_records(5, seed=0)
    batch = as_batch(pairs, tokenizer)
    for i, (sentence, record) in enumerate(pairs):
        learned = batch["labels"][i] != IGNORED
        assert tokenizer.decode(batch["labels"][i][learned]) == answer(record) + tokenizer.eos_token
        assert torch.equal(batch["input_ids"][i][learned], batch["labels"][i][learned])
        read = batch["attention_mask"][i].bool() & ~learned
        assert tokenizer.decode(batch["input_ids"][i][read]) == prompt(sentence)
        assert int(batch["attention_mask"][i].sum()) == int(read.sum() + learned.sum())


def test_batches_of_a_seed_are_new_records_each(tiny):
    batches = list(training_batches(3, 4, tiny[1], seed=5))
    expected = as_batch(make_records(12, seed=5)[4:8], tiny[1])
    assert len(batches) == 3
    assert all(torch.equal(batches[1][name], expected[name]) for name in expected)


def test_the_loss_is_the_mean_over_answer_tokens(tiny):
    model, tokenizer = tiny
    pairs = make_records(5, split="test", seed=0)
    nats = []
    for pair in pairs:  # one at a time: no padding
        batch = as_batch([pair], tokenizer)
        logits = model(batch["input_ids"]).logits[0, :-1]
        per_token = F.cross_entropy(logits, batch["input_ids"][0, 1:], reduction="none")
        nats.append(per_token[batch["labels"][0, 1:] != IGNORED])
    assert mean_loss(model, tokenizer, pairs, batch_size=2) == pytest.approx(
        torch.cat(nats).mean().item(), abs=1e-5
    )


# what the model writes


def test_padding_on_the_left_changes_no_answer(tiny):
    model, tokenizer = tiny
    sentences = [sentence for sentence, _ in make_records(6, split="test", seed=0)]
    assert len({len(sentence) for sentence in sentences}) > 1
    together = generate_answers(model, tokenizer, sentences, batch_size=6)
    assert together == [generate_answers(model, tokenizer, [one])[0] for one in sentences]
    ids = torch.tensor([tokenizer(prompt(sentences[0]))["input_ids"]])
    for _ in range(MAX_NEW_TOKENS):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert together[0] == tokenizer.decode(ids[0, len(tokenizer(prompt(sentences[0]))["input_ids"]) :])


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ('{"name": "A", "item": "b c", "quantity": 2, "price": 3}', True),
        (' {"price": 3, "quantity": 2, "item": "b c", "name": "A"}', True),
        ('{"name": "A", "item": "b c", "quantity": "2", "price": 3}', False),
        ('{"name": "A", "item": "b c", "quantity": 2}', False),
        ('{"name": "A", "item": "b c", "quantity": 2, "price": 3} and', False),
        ("[1, 2", False),
        ("", False),
    ],
)
def test_a_match_is_the_whole_record(monkeypatch, written, right):
    record = {"name": "A", "item": "b c", "quantity": 2, "price": 3}
    other = json.dumps(record)
    monkeypatch.setattr(records, "generate_answers", lambda *_, **__: [written, other])
    assert exact_match(None, None, [("x", record), ("y", record)]) == (1.0 if right else 0.5)
    assert parsed(answer(record)) == record


# training


def test_a_tiny_model_learns_the_form_and_only_the_adapter_moves(tiny):
    model, tokenizer = tiny
    torch.manual_seed(0)
    apply_lora(model, "all-linear", r=8, lora_alpha=16)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    seen = fine_tune(model, tokenizer, 30, batch_size=4, learning_rate=1e-2, seed=0, progress=False)
    assert len(seen.losses) == len(seen.times_s) == 30 and seen.step_s > 0
    assert seen.losses[-1] < 0.9 * seen.losses[0]
    assert not model.training
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    adapter = {id(parameter) for parameter in lora_parameters(model)}
    assert moved == {name for name, parameter in model.named_parameters() if id(parameter) in adapter}


def test_losses_are_those_of_a_loop_written_out_with_a_rate_that_falls(tiny):
    model, tokenizer = tiny
    torch.manual_seed(0)
    apply_lora(model, ["q_proj"], r=2, lora_alpha=4)
    copy = tiny_language_model()[0]
    torch.manual_seed(0)
    apply_lora(copy, ["q_proj"], r=2, lora_alpha=4)
    settings = {"batch_size": 2, "learning_rate": 1e-2, "seed": 7, "progress": False}
    seen = fine_tune(model, tokenizer, 8, stop_after=4, **settings)
    optimizer = torch.optim.AdamW(lora_parameters(copy), weight_decay=0.0)
    expected = []
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 1e-2 * (8 - step) / 8
        batch = as_batch(make_records(8, seed=7)[2 * step : 2 * step + 2], tokenizer)
        scores, labels = (
            copy(batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
            batch["labels"],
        )
        loss = F.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert seen.losses == pytest.approx(expected, abs=1e-5)


def test_nothing_to_train_is_said(tiny):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="there is nothing to train"):
        fine_tune(model.requires_grad_(False), tokenizer, 1)
