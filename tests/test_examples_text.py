"""The examples with texts, in small: they run, and what they measure with is right."""

import random

import numpy as np
import pytest
import torch

from examples import dialogue_state, key_sentences, long_documents

SHORT = {"max_steps": 2, "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}


@pytest.fixture
def tiny(monkeypatch):
    for example in (dialogue_state, key_sentences, long_documents):
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        monkeypatch.setattr(example, "SIZES", example.SIZES | sizes)
    monkeypatch.setattr(key_sentences, "VOCABULARY", 300)


def test_long_documents(tiny, tmp_path):
    examples = [("numpy arrays have shapes " * 60, 1), ("sympy solves equations " * 60, 2)] * 4
    trainer, read = long_documents.trained(examples, str(tmp_path), vocab_size=300, **SHORT)
    assert trainer.state.global_step == 2
    whole, first = read(examples), read(examples, 1)
    assert len(whole[0]["input_ids"]) > len(first[0]["input_ids"]) == long_documents.SEGMENT
    assert 0 <= trainer.evaluate(first)["eval_accuracy"] <= 1
    assert long_documents.bag_of_words(examples, examples) == 1.0
    said = long_documents.documents("networkx")
    assert len(said) > 20 and ">>>" not in said[0]


def test_a_dialogue_says_what_is_booked():
    draw = random.Random(1)
    dialogues = [dialogue_state.dialogue(draw) for _ in range(50)]
    for turns in dialogues:
        assert [message["role"] for message, _ in turns] == ["user", "assistant"] * dialogue_state.EXCHANGES
        assert all(before[1] == after[1] for before, after in zip(turns[::2], turns[1::2], strict=True))
    state = {"food": None, "day": "monday", "time": None, "people": None}
    said = [({"role": "user", "content": text}, state) for text in ("on friday", "on monday instead of on tuesday ?")]
    assert dialogue_state.last_mention(said[:1])["day"] == "friday"
    assert dialogue_state.last_mention(said)["day"] == "tuesday"  # which is wrong
    answers = {str(dialogue_state.guest(draw, state, ("day", "friday"))) for _ in range(50)}
    assert "('yes , that is fine', {'day': 'friday'})" in answers


def test_dialogue_state(tiny, tmp_path):
    dialogues = [dialogue_state.dialogue(random.Random(seed)) for seed in range(6)]
    model, processor = dialogue_state.trained(dialogues, str(tmp_path), **SHORT)
    states, costs = dialogue_state.follow(model, processor, dialogues)
    assert len(states) == 10 and all(len(of_turn) == 6 for of_turn in states)
    assert costs[9] < 3 * costs[1] and sum(costs) > 4 * costs[9]
    messages = [[message for message, _ in turns] for turns in dialogues]
    whole = processor.dialogue(messages, padding=True, return_tensors="pt")
    places = dialogue_state.PLACES["day"]
    with torch.no_grad():
        best = model(**whole).logits[:, places].argmax(-1)
    assert [dialogue_state.VALUES[places[i]][1] for i in best] == [state["day"] for state in states[-1]]


def test_key_sentences(tiny, tmp_path):
    sections = ["One begins here now. It goes on like this. It ends like this."] * 2 + ["Too short to be one."]
    ((said, key),) = key_sentences.texts_of(sections)
    assert len(said) == 6 and key == [1.0, 0.0, 0.0] * 2
    assert key_sentences.precision([(said, key)], [[3, 0, 0, 2, 0, 0]]) == 1.0
    assert key_sentences.precision([(said, key)], [[3, 4, 0, 2, 0, 0]]) == 0.5
    assert len(key_sentences.licence()) > 10
    texts = key_sentences.texts()[:8]
    scores = key_sentences.trained(texts, str(tmp_path), **SHORT)(texts)
    assert [len(score) for score in scores] == [len(said) for said, _ in texts]
    assert np.isfinite(np.concatenate(scores)).all()
