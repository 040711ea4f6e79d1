"""Who sees whom: prefixes, windows, encoders."""

from unittest.mock import patch

import pytest
import torch
from laboratory import build

from promises import EXACT, some_tokens


def influence(model, column, tokens=None, **told):
    """[length] how much the answers of row 0 change when the token at `column` does."""
    tokens = some_tokens() if tokens is None else tokens
    changed = tokens.clone()
    changed[0, column] = (changed[0, column] + 1) % 90 + 3
    with torch.no_grad():
        return (model(tokens, **told)[0] - model(changed, **told)[0])[0].abs().amax(-1)


def test_a_prefix_sees_both_ways_and_the_rest_back_only():
    model = build("ForCausalLM", direction="prefix")
    inside = influence(model, 9, prefix_length=10)
    assert (inside > 1e-6).all()
    after = influence(model, 10, prefix_length=10)
    assert (after[:10] == 0).all() and (after[10:] > 1e-6).all()
    no_prefix = influence(model, 9)
    assert (no_prefix[:9] == 0).all()


@torch.no_grad()
def test_lengths_of_prefixes_are_counted_per_row_in_real_tokens():
    model, tokens, lengths = build("ForCausalLM", direction="prefix"), some_tokens(), torch.tensor([10, 25])
    told = {"prefix_mask": torch.arange(70) < lengths[:, None]}
    expected = model(tokens, **told).logits
    torch.testing.assert_close(model(tokens, prefix_length=lengths).logits, expected, **EXACT)
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1], prefix_length=int(length)).logits
        torch.testing.assert_close(alone, expected[row : row + 1], **EXACT)
    padded = torch.cat((tokens[:, :7], tokens), dim=1)
    mask = (torch.arange(77) >= 7).long().expand(2, -1)
    found = model(padded, attention_mask=mask, prefix_length=lengths).logits[:, 7:]
    torch.testing.assert_close(found, expected, **EXACT)
    told = {"prefix_mask": torch.arange(77) < 7 + lengths[:, None]}
    torch.testing.assert_close(model(padded, attention_mask=mask, **told).logits[:, 7:], expected, **EXACT)


def test_generation_after_a_prefix_does_not_depend_on_the_cache():
    model, tokens = build("ForCausalLM", direction="prefix"), some_tokens(length=20)
    padded = torch.cat((torch.zeros_like(tokens[:, :3]), tokens), dim=1)
    mask = (padded > 0).long()
    lengths = torch.tensor([20, 12])
    told = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with_cache = model.generate(padded, prefix_length=lengths, **told)
    assert torch.equal(model.generate(padded, prefix_length=lengths, use_cache=False, **told), with_cache)
    static = model.generate(padded, prefix_length=lengths, cache_implementation="static", **told)
    assert torch.equal(static, with_cache)
    assert not torch.equal(model.generate(padded, **told), with_cache)  # the prefix does matter
    expected = padded
    for _ in range(12):
        seen = torch.cat((mask, mask.new_ones(2, expected.shape[1] - 23)), dim=1)
        logits = model(expected, attention_mask=seen, prefix_length=lengths, use_cache=False).logits[:, -1]
        expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(expected, with_cache)


@torch.no_grad()
def test_a_prefix_after_a_cache_is_refused():
    model, tokens = build("ForCausalLM", direction="prefix"), some_tokens()
    cache = model(tokens[:, :10], prefix_length=20, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="give it in one piece"):
        model(tokens[:, 10:], prefix_length=20, past_key_values=cache)
    cache = model(tokens[:, :20], prefix_length=20, use_cache=True).past_key_values
    after = model(tokens[:, 20:], prefix_length=20, past_key_values=cache).logits
    torch.testing.assert_close(after, model(tokens, prefix_length=20).logits[:, 20:], **EXACT)


def test_a_window_reaches_as_far_as_its_layers_add_up():
    model = build("ForCausalLM", layer_types=["sliding_attention"] * 2, sliding_window=9)
    reached = influence(model, 20)
    farthest = 20 + 2 * (9 - 1)
    assert (reached[:20] == 0).all() and (reached[farthest + 1 :] == 0).all()
    assert (reached[20 : farthest + 1] > 1e-9).all()
    mixed = influence(build("ForCausalLM", layer_types=["sliding_attention", "full_attention"], sliding_window=9), 20)
    assert (mixed[20:] > 1e-9).all()


@pytest.mark.parametrize("position_type", ["rope", "alibi", "t5", "learned"])
def test_an_encoder_sees_both_ways(position_type):
    model = build(direction="bidirectional", position_type=position_type)
    for column in (0, 40, 69):
        assert (influence(model, column) > 1e-9).all()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_window_is_the_same_as_a_band_and_as_a_mask(attention):
    """Texts up to its length, the bias by distance and recorded weights take a mask; other texts a band."""
    model = build(layer_types=["sliding_attention"] * 2, sliding_window=9).double()
    model.set_attn_implementation(attention)
    tokens = some_tokens()
    band = model(tokens)[0]
    with patch.object(type(model.embed_positions), "biased", True):
        mask = model(tokens)[0]
    exact = EXACT if attention == "sdpa" else {"atol": 1e-4, "rtol": 1e-4}  # transformers' softmax is in float32
    torch.testing.assert_close(band, mask, **exact)
    real = (torch.arange(80) % 8 < 7).expand(2, -1)  # padding between real tokens, of which the window counts none
    padded = torch.full((2, 80), 5).masked_scatter(real, tokens)
    found = model(padded, attention_mask=real.long())[0][real].view(2, 70, -1)
    torch.testing.assert_close(found, band, **EXACT)
    cached = model(tokens, use_cache=True)
    torch.testing.assert_close(cached[0], band, **EXACT)
    step = model(tokens[:, :1], past_key_values=cached.past_key_values)[0]
    torch.testing.assert_close(step[:, 0], model(torch.cat((tokens, tokens[:, :1]), 1))[0][:, -1], **exact)
