"""Span corruption and prefixes: nothing is lost, what is hidden is as much as asked, and seeds decide all."""

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_arch import find
from hf_arch.collators import PrefixLMCollator, SpanCorruptionCollator
from promises import Case, some_tokens

SENTINELS = tuple(range(999, 899, -1))
END = 1


def spans(**fields):
    told = {"sentinel_token_ids": SENTINELS, "eos_token_id": END, "seed": 0}
    return SpanCorruptionCollator(**(told | fields))


def rows(*lengths):
    draw = np.random.default_rng(0)
    return [{"input_ids": draw.integers(10, 800, length).tolist()} for length in lengths]


def restored(source, answer):
    """The text, with the spans of the answer in place of the sentinels."""
    source, answer = ([token for token in row if token not in (0, -100, END)] for row in (source, answer))
    hidden, sentinel = {}, None
    for token in answer:
        sentinel = token if token in SENTINELS else sentinel
        hidden.setdefault(sentinel, []).extend([] if token in SENTINELS else [token])
    assert list(hidden) == [token for token in source if token in SENTINELS] == list(SENTINELS[: len(hidden)])
    return [found for token in source for found in hidden.get(token, [token])]


@pytest.mark.parametrize("end", [END, None])
def test_source_and_answer_make_up_the_text(end):
    features = rows(2, 3, 10, 100, 500)
    batch = spans(eos_token_id=end)(features)
    for feature, source, mask, answer in zip(
        features, *(batch[key].tolist() for key in batch_keys(batch)), strict=True
    ):
        assert restored(source, answer) == feature["input_ids"]
        real = [token for token, shown in zip(source, mask, strict=True) if shown]
        assert (real[-1] == END) == (end is not None) and not any(source[len(real) :])
        assert source[0] not in SENTINELS


def batch_keys(batch):
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert all(values.dtype == torch.long for values in batch.values())
    return ("input_ids", "attention_mask", "labels")


@pytest.mark.parametrize("density, mean", [(0.15, 3.0), (0.5, 3.0), (0.15, 8.0), (0.3, 1.0)])
def test_as_much_is_hidden_as_asked_everywhere_alike(density, mean):
    collator = spans(noise_density=density, mean_span_length=mean, seed=3)
    features = [{"input_ids": np.arange(10, 210)}] * 400
    hidden = np.zeros(200)
    lengths = []
    for answer in collator(features, return_tensors="np")["labels"]:
        named = [token for token in answer.tolist() if 10 <= token < 210]
        hidden[np.array(named) - 10] += 1
        lengths.append(np.isin(answer, SENTINELS).sum())
    count = round(200 * density)
    assert hidden.sum() == 400 * count and set(lengths) == {round(count / mean)}
    middle = hidden[40:160] / 400
    assert abs(middle.mean() - density) < 0.04 and middle.std() < 0.06


def test_seeds_decide_all_and_padding_and_ends_are_no_text():
    features = rows(50, 60)
    again = [spans()(features)["labels"] for _ in range(2)]
    assert torch.equal(*again)
    collator = spans()
    first, second = collator(features)["labels"], collator(features)["labels"]
    assert torch.equal(first, again[0]) and (first.shape != second.shape or not torch.equal(first, second))
    torch.manual_seed(5)
    one = spans(seed=None)(features)["labels"]
    torch.manual_seed(5)
    assert torch.equal(spans(seed=None)(features)["labels"], one)
    padded = [
        {"input_ids": [*row["input_ids"], END, 0, 0], "attention_mask": [1] * (len(row["input_ids"]) + 1) + [0, 0]}
        for row in features
    ]
    assert torch.equal(spans()(padded)["labels"], again[0])


def test_lengths_for_a_model_and_input_of_the_decoder():
    collator = spans(pad_to_multiple_of=8, decoder_start_token_id=0)
    length = collator.raw_length(512)
    assert length == 568 and collator.input_length(569) > 512  # T5's own number, for 512 tokens with the end
    batch = collator(rows(length, 100))
    assert batch["input_ids"].shape == (2, 512) and batch["labels"].shape[1] % 8 == 0
    assert batch["decoder_input_ids"].shape == batch["labels"].shape
    expected = torch.where(batch["labels"] == -100, 0, batch["labels"])[:, :-1]
    shown = batch["labels"][:, 1:] != -100
    assert torch.equal(batch["decoder_input_ids"][:, 1:][shown], expected[shown])
    assert not batch["decoder_input_ids"][:, 0].any()


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="has 1 tokens"):
        spans()([{"input_ids": [5]}])
    with pytest.raises(ValueError, match="5 hidden spans, but there are 2 sentinel_token_ids"):
        spans(sentinel_token_ids=(9, 8))(rows(100))
    for fields in ({"noise_density": 1.5}, {"mean_span_length": 0.5}):
        with pytest.raises(ValueError, match="between 0 and 1, the other is at least 1"):
            spans(**fields)
    with pytest.raises(ValueError, match="no room"):
        spans().raw_length(2)
    with pytest.raises(ValueError, match="from 0.9 to 0.1"):
        PrefixLMCollator(least=0.9, most=0.1)


def test_prefixes_of_random_length():
    features = rows(2, 3, *[40] * 300)
    batch = PrefixLMCollator(seed=0)(features)
    for feature, ids, mask, labels, prefix in zip(
        features, *(batch[key] for key in ("input_ids", "attention_mask", "labels", "prefix_length")), strict=True
    ):
        length = int(mask.sum())
        assert ids[:length].tolist() == feature["input_ids"]
        assert (labels[:prefix] == -100).all() and torch.equal(labels[prefix:length], ids[prefix:length])
        assert (labels[length:] == -100).all()
    assert set(batch["prefix_length"][2:].tolist()) == set(range(1, 40))
    half = PrefixLMCollator(seed=0, least=0.25, most=0.5, source_and_answer=True)(features[2:])
    lengths = half["attention_mask"].sum(-1)
    assert (lengths.min(), lengths.max()) == (10, 20) and "prefix_length" not in half
    for feature, ids, labels, length in zip(features[2:], half["input_ids"], half["labels"], lengths, strict=True):
        assert ids[:length].tolist() + labels[labels != -100].tolist() == feature["input_ids"]


@pytest.mark.parametrize("name", ["encoder_decoder", "transformer"])
def test_a_trainer_takes_the_batches(name, tmp_path):
    if name == "transformer":
        model = Case(find(name), "ForCausalLM", fields={"direction": "prefix"}).build(torch.float32)
        collator = PrefixLMCollator(seed=0)
    else:
        model = Case(find(name), "ForConditionalGeneration").build(torch.float32)
        collator = SpanCorruptionCollator(sentinel_token_ids=(95, 94, 93, 92), eos_token_id=2, seed=0)
    arguments = TrainingArguments(str(tmp_path), max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True)
    data = [{"input_ids": row} for row in some_tokens(8, 30).clamp(max=90)]
    outcome = Trainer(model, arguments, train_dataset=data, data_collator=collator).train()
    assert 0 < outcome.training_loss < 20
