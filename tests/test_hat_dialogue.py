"""Dialogues: turns are segments, and a new turn is read without reading the old ones again."""

import pytest
import torch
from test_hat_processor import make, tokenizer, words  # noqa: F401
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hf_arch import find
from promises import EXACT, Case, some_tokens

ROW = find("hat")
SHAPES = {
    "hat": {"layer_types": ["level_0", "level_0", "level_1"], "type_vocab_size": 4},
    "gru": {"layer_types": ["gru_0", "pool_0", "gru_1"], "document_pooling": "leader"},
    "three": {"layer_types": ["level_0", "level_1", "down_1", "level_2", "level_2"], "num_hidden_layers": 5}
    | {"segment_lengths": [5, 6], "shared_levels": True},
}
TALK = [
    {"role": "system", "content": "a b"},
    {"role": "user", "content": "c d e f g h"},
    {"role": "assistant", "content": "i. j"},
]


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_turn_by_turn_is_the_whole_dialogue(shape):
    model = Case(ROW, "Model").build(**SHAPES[shape])
    cuts, tokens = [0, 7, 30, 31, 52, 60], some_tokens(2, 60)
    starts, kinds = torch.zeros_like(tokens), tokens % 4 if shape == "hat" else None
    starts[:, [12, 40]], starts[:, cuts[:-1]] = 1, 2
    state = None
    for start, end in zip(cuts, cuts[1:], strict=False):
        told = {"segment_starts": starts[:, start:end]}
        told |= {} if kinds is None else {"token_type_ids": kinds[:, start:end]}
        found, state = model.read_turn(state, tokens[:, start:end], **told)
        told = {"segment_starts": starts[:, :end]} | ({} if kinds is None else {"token_type_ids": kinds[:, :end]})
        whole = model(tokens[:, :end], **told)
        assert_close(found.last_hidden_state, whole.last_hidden_state[:, start:], **EXACT)
        turns = whole.level_masks[0, -1].sum()
        assert found.level_masks[0, -1].sum() == turns == state.real.shape[1]
        assert_close(found.level_embeddings[:, -1, :turns], whole.level_embeddings[:, -1, :turns], **EXACT)
        assert_close(found.pooler_output, whole.pooler_output, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("shape", ["hat", "three"])
def test_dialogues_of_a_batch_go_on_at_their_own_pace(shape):
    model, tokens = Case(ROW, "Model").build(**SHAPES[shape]), some_tokens(2, 30)
    state, masks = None, ([[1] * 10, [0] * 3 + [1] * 7], [[1] * 10, [0] * 10], [[1] * 4 + [0] * 6, [1] * 10])
    for part, mask in zip(tokens.split(10, dim=1), masks, strict=True):
        found, state = model.read_turn(state, part, torch.tensor(mask))
    assert state.real.tolist() == [[True] * 3, [True, True, False]]
    real = torch.cat([torch.tensor(mask) for mask in masks], dim=1).bool()
    for row, begins in ((0, [0, 10, 20]), (1, [0, 7])):
        ids = tokens[row][real[row]][None]
        starts = torch.zeros_like(ids)
        starts[0, begins] = 2
        whole = model(ids, segment_starts=starts)
        assert_close(found.pooler_output[row], whole.pooler_output[0], **EXACT)


@torch.no_grad()
def test_the_tenth_turn_costs_what_the_second_does():
    """But for the layers across turns, whose members are so many as there are turns."""
    model = Case(ROW, "Model").build(layer_types=["level_0", "level_0", "level_1"])
    model.set_attn_implementation("eager")
    state, costs = None, []
    for turn in range(10):
        with FlopCounterMode(display=False) as counter:
            _, state = model.read_turn(state, some_tokens(1, 16, seed=turn))
        costs.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        model(some_tokens(1, 160))
    assert costs[9] < 1.3 * costs[1] and counter.get_total_flops() > 7 * costs[9]


def test_what_cannot_go_on():
    told = {"input_ids": some_tokens(2, 9)}
    for fields in ({}, {"layer_types": ["level_0", "level_1", "down_1"]}, {"segment_lengths": []}):
        fields = {"layer_types": ["level_0"] * 3} | fields if "segment_lengths" in fields else fields
        with pytest.raises(ValueError, match="Put the layers of the last level at the end"):
            Case(ROW, "Model").build(**fields).read_turn(**told)
    model = Case(ROW, "Model").build(**SHAPES["hat"])
    _, state = model.read_turn(**told)
    with pytest.raises(ValueError, match="state is of 2 dialogues, the new turns are of 1"):
        model.read_turn(state, told["input_ids"][:1])


def test_messages_become_turns(make):  # noqa: F811
    processor = make()
    found = processor.dialogue(TALK)
    assert words(processor, found["input_ids"]) == "<s> a b <s> c d e f <s> g h <s> i . j"
    assert found["token_type_ids"] == [0] * 3 + [1] * 8 + [2] * 4
    assert [starts for starts in found["segment_starts"] if starts] == [2, 2, 1, 2]
    last = processor.dialogue(TALK, since=2)
    assert all(last[name] == found[name][-4:] for name in found)
    both = processor.dialogue([TALK, TALK[:1]], padding=True, return_tensors="pt")
    assert both["input_ids"].shape == both["token_type_ids"].shape == (2, 15) and both["attention_mask"][1].sum() == 3


def test_a_chat_template_says_what_a_turn_is(make):  # noqa: F811
    template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} . {% endfor %}"
    processor = make(chat_template=template, segment_length=20)
    assert words(processor, processor.dialogue(TALK)["input_ids"]) == "<s> s a b . <s> u c d e f g h . <s> a i . j ."
    with pytest.raises(ValueError, match="changes old turns"):
        make(chat_template="{{ messages | length }}").dialogue(TALK)
    with pytest.raises(ValueError, match="Message 0 is of 'bot'; roles are system, user"):
        processor.dialogue([{"role": "bot", "content": "a"}])


@torch.no_grad()
def test_a_conversation_goes_on(make):  # noqa: F811
    processor, model = make(segment_length=16), Case(ROW, "Model").build(**SHAPES["hat"])
    state = None
    for number in range(1, 4):
        turn = processor.dialogue(TALK[:number], since=number - 1, padding=True, return_tensors="pt")
        found, state = model.read_turn(state, **turn)
    whole = model(**processor.dialogue([TALK], return_tensors="pt"))
    assert_close(found.pooler_output, whole.pooler_output, **EXACT)
