"""HAT against its definition written slowly, and what it makes of segments of every kind."""

import inspect

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from slow_hat import slow_hat
from torch.testing import assert_close

from hf_arch import find
from promises import EXACT, VARIANTS, Case, some_tokens

ROW = find("hat")
SHAPES = {"two_levels": {}} | VARIANTS["hat"]


def build(head: str = "Model", **fields):
    return Case(ROW, head).build(**fields)


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("length", [1, 16, 17, 48, 70])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_its_definition(shape, length, given):
    model, tokens = build(**SHAPES[shape]), some_tokens(length=length)
    marks = torch.zeros_like(tokens)
    if given:  # short segments, one longer than segments may be, one that begins where another is full
        marks = torch.tensor([(i in (3, 4, 9, 41, 57)) + 2 * (i in (5, 60)) for i in range(length)]).expand(2, -1)
    found = model(tokens, segment_starts=marks if given else None)[0]
    for row, ids, starts in zip(found, tokens, marks.tolist(), strict=True):
        assert_close(row, slow_hat(weights_of(model), model.config, ids, starts), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_given_segments_under_padding_and_packing(shape):
    """A row with padding on both sides and inside a segment, and one of two documents."""
    model, tokens = build(**SHAPES[shape]), some_tokens(2, 40)
    starts = torch.zeros_like(tokens)
    starts[:, ::7] = 1
    starts[:, 21] = 2
    alone = [
        model(row[None, part], segment_starts=marks[None, part])
        for row, marks, part in (
            (tokens[0], starts[0], slice(None)),
            (tokens[1], starts[1], slice(0, 25)),
            (tokens[1], starts[1], slice(25, None)),
        )
    ]
    real = torch.tensor([[0] * 3 + [1] * 12 + [0] * 4 + [1] * 28 + [0] * 2, [1] * 40 + [0] * 9]).bool()
    ids, marks = (torch.full((2, 49), fill).masked_scatter(real, x) for fill, x in ((5, tokens), (2, starts)))
    positions = torch.zeros_like(ids).masked_scatter(real, torch.cat([torch.arange(n) for n in (40, 25, 15)]))
    found = model(ids, attention_mask=real.long(), position_ids=positions, segment_starts=marks)
    assert_close(found.last_hidden_state[real], torch.cat([each[0][0] for each in alone]), **EXACT)
    for document, each in enumerate(alone):
        assert_close(found.pooler_output[document], each.pooler_output[0], **EXACT)
        count = each.segment_mask.sum()
        assert found.segment_mask[document].sum() == count
        assert_close(found.segment_embeddings[document, :count], each.segment_embeddings[0, :count], **EXACT)
        assert not found.segment_embeddings[document, count:].any()


@torch.no_grad()
def test_embeddings_of_segments_and_documents():
    model, tokens = build(), some_tokens()
    found = model(tokens)
    assert_close(found.segment_embeddings, found.last_hidden_state[:, ::16])
    assert_close(found.pooler_output, found.segment_embeddings.amax(1))
    assert found.segment_mask.all() and found.segment_mask.shape == (2, 5)
    assert found[1] is found.pooler_output
    assert torch.equal(found.level_embeddings, found.segment_embeddings[:, None])
    assert_close(model(tokens, return_dict=False)[1], found.pooler_output)
    assert isinstance(model(tokens, return_dict=False), tuple)


@torch.no_grad()
def test_whole_segments_are_seen_without_a_copy():
    model, seen = build(), []
    model.layers[0].mixer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    normed = []
    model.embed_norm.register_forward_hook(lambda _, args, out: normed.append(out))
    model(some_tokens(length=64))
    assert seen[0].shape == (8, 16, 32) and seen[0].data_ptr() == normed[0].data_ptr()


@torch.no_grad()
def test_segments_meet_across_levels_only():
    """A change in one segment reaches the others' followers through the leaders, and not in a model without them."""
    tokens = some_tokens(1)
    changed = tokens.clone()
    changed[0, 20] = 3 + changed[0, 20] % 90
    for layers, reached in ((["level_0", "level_1", "level_0"], True), (["level_0", "level_0", "level_1"], False)):
        model = build(layer_types=layers)
        change = (model(changed)[0] - model(tokens)[0]).abs().amax(-1)[0]
        assert (change[40] > 1e-4) == reached and change[48] > 1e-4  # a follower and a leader of other segments


@torch.no_grad()
def test_long_texts():
    sizes = {"segment_lengths": [128], "max_position_embeddings": 128 * 1024}
    model = build(**sizes, hidden_size=8, intermediate_size=8, num_attention_heads=1).float()
    found = model(torch.randint(3, 96, (1, 100_000)))
    assert found.last_hidden_state.shape == (1, 100_000, 8) and found.segment_mask.shape == (1, 782)
    assert found.last_hidden_state.isfinite().all()


def test_what_cannot_be_said_of_segments():
    model, tokens = build(), some_tokens(length=300)
    with pytest.raises(ValueError, match="has 19 segments of level 0, and the model places for 16"):
        model(tokens)
    every = torch.ones(2, 70, dtype=torch.long)
    with pytest.raises(ValueError, match="has 70 segments of level 0, and the model places for 16"):
        model(tokens[:, :70], segment_starts=every)
    with pytest.raises(ValueError, match="has 300 tokens, and the model places for 256"):
        build(**SHAPES["one_level"])(tokens)
    mask = torch.ones_like(tokens)
    mask[1] = 0
    with pytest.raises(ValueError, match="Row 1 has no real token"):
        model(tokens, attention_mask=mask)
    with pytest.raises(ValueError, match=r"attention_mask is \[2, 1, 9, 9\]; HAT takes one number per token"):
        model(tokens[:, :9], attention_mask=torch.ones(2, 1, 9, 9))
    with pytest.raises(ValueError, match=r"segment_starts are \[2, 8\], but the tokens \[2, 9\]"):
        model(tokens[:, :9], segment_starts=torch.ones(2, 8))
    with pytest.raises(ValueError, match="keep no cache: call with use_cache=False"):
        model(tokens[:, :9], use_cache=True)
    with pytest.raises(ValueError, match=r"Expected \[batch, choices, length\], not \[2, 9\]"):
        build("ForMultipleChoice")(tokens[:, :9])


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"segment_lengths": [0]}, "segment_lengths has 0: a segment has at least one member"),
        ({"segment_lengths": [4, 4]}, "No layer works at level_2: name it in layer_types"),
        ({"layer_types": ["level_0", "level_3", "level_0"]}, "level_3; hf_arch_hat knows level_0, level_1"),
        ({"layer_types": ["level_1"] * 3}, "No layer works at level_0"),
        ({"layer_types": ["pool_0", "level_1", "down_1"]}, "No layer works at level_0"),
        ({"residual_type": "pre"}, "residual_type 'pre' is unknown; there are post_norm, replaced"),
        ({"layer_types": ["gru_0", "gru_1", "gru_0"], "hidden_size": 25, "num_attention_heads": 5}, "25 is odd"),
    ],
)
def test_configurations_that_cannot_be(fields, said):
    with pytest.raises(StrictDataclassError, match=said):
        ROW.tiny_config(**fields)


def test_a_shallow_model_has_a_layer_at_each_level():
    for depth, kinds in ((2, ["level_0", "level_1"]), (3, ["level_0", "level_0", "level_1"])):
        assert ROW.load("Config")(num_hidden_layers=depth).layer_types == kinds


@pytest.mark.parametrize("head", [head for head in ROW.heads if head != "Model"])
def test_the_trainer_hands_over_what_the_processor_says(head):
    names = inspect.signature(ROW.load(head).forward).parameters
    assert {"input_ids", "attention_mask", "segment_starts", "labels"} <= set(names)


def test_the_default_is_the_published_layout():
    config = ROW.load("Config")()
    assert config.layer_types == ["level_0", "level_0", "level_0", "level_1"] * 4 and config.level_lengths == [128, 32]


@torch.no_grad()
def test_choices_are_scored_as_texts_of_their_own():
    model, tokens = build("ForMultipleChoice"), some_tokens(6).view(2, 3, -1)
    mask = torch.ones_like(tokens)
    mask[1, 2, 40:] = 0
    starts = torch.zeros_like(tokens)
    starts[..., ::9] = 1
    found = model(tokens, attention_mask=mask, segment_starts=starts, labels=torch.tensor([2, 0]))
    for row in range(2):
        for choice in range(3):
            part = slice(0, 40 if (row, choice) == (1, 2) else 70)
            told = {"segment_starts": starts[row, choice, part][None, None]}
            assert_close(model(tokens[row, choice, part][None, None], **told).logits[0, 0], found.logits[row, choice])
    expected = torch.nn.functional.cross_entropy(found.logits, torch.tensor([2, 0]))
    assert_close(found.loss, expected)
    told = {"labels": torch.tensor([2, 0]), "num_items_in_batch": 8}  # of all pieces of an accumulated batch
    pieces = model(tokens, attention_mask=mask, segment_starts=starts, **told)
    assert_close(pieces.loss, found.loss * 2 / 8)


@torch.no_grad()
def test_a_score_for_each_segment():
    told = {"segment_starts": (torch.arange(70) % 30 == 0).long().expand(2, -1)}  # of 16, 14, 16, 14 and 10 tokens
    model, tokens = build("ForSegmentClassification", num_labels=3), some_tokens()
    labels = torch.tensor([[0, 2, 1, -100, 1], [2, 2, -100, 0, 1]])
    found = model(tokens, labels=labels, **told)
    expected = model.score(model.model(tokens, **told).segment_embeddings)
    assert_close(found.logits, expected)
    assert_close(found.loss, torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten()))
    assert_close(model(tokens, labels=labels, num_items_in_batch=16, **told).loss, found.loss / 2)
    chooses = build("ForSegmentClassification", num_labels=1)
    found = chooses(tokens, labels=(labels > 0).float(), **told)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(found.logits[..., 0], (labels > 0).double())
    assert_close(found.loss, loss)
    with pytest.raises(ValueError, match=r"labels are \[2, 70\], but the segments \[2, 5\]: one for each segment"):
        model(tokens, labels=tokens, **told)
