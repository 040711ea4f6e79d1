"""What the HAT encoder-decoder remembers of a source: keys that are made once, which rows and beams share, and of which
a step reads a few."""

import inspect

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin

from hf_arch import find, fork
from promises import EXACT, Case, some_tokens

ROW = find("hat_encoder_decoder")
CASE = Case(ROW, "ForConditionalGeneration")
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def model():
    return CASE.build()


@pytest.fixture
def source(tokens):
    """A padded batch with segments of the caller's."""
    mask, starts = torch.ones_like(tokens), torch.zeros_like(tokens)
    mask[1, 50:] = 0
    starts[:, ::7] = starts[:, 3] = starts[:, 4] = 1
    return {"input_ids": tokens, "attention_mask": mask, "segment_starts": starts}


@torch.no_grad()
def test_steps_equal_one_pass_and_keys_of_the_source_are_made_once(model, source, tokens):
    answer, calls = tokens[:, 20:60], []
    told = {name: source[name] for name in ("attention_mask", "segment_starts")}
    expected = model(**source, decoder_input_ids=answer, use_cache=False, output_attentions=True)
    for layer in model.model.decoder.layers:
        for part in (layer.cross_attention.k_proj, layer.cross_attention.segment_k_proj):
            part.register_forward_hook(lambda *args: calls.append(1))
    told["encoder_outputs"], cache, found = model.model.encoder(**source), None, []
    for piece in answer.split((5, 1, 3, 31), dim=1):
        told |= {"past_key_values": cache, "output_attentions": True}
        found.append(model(**told, decoder_input_ids=piece, use_cache=True))
        cache = found[-1].past_key_values
    assert_close(torch.cat([each.logits for each in found], dim=1), expected.logits, **EXACT)
    for layer, weights in enumerate(expected.cross_attentions):
        assert weights.shape == (2, 4, 40, 70) and not weights[1, ..., 50:].any()
        assert (weights > 0).sum(-1).max() <= 16  # two segments of eight
        assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), **EXACT)
        assert_close(torch.cat([each.cross_attentions[layer] for each in found], dim=2), weights, **EXACT)
    assert len(calls) == 4 and cache.get_seq_length() == 40
    told |= {"encoder_outputs": told["encoder_outputs"].to_tuple(), "past_key_values": None}
    assert_close(model(**told, decoder_input_ids=answer).logits, expected.logits, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beams_share_the_source(model, source, options, monkeypatch):
    """As each with a copy of it, whose keys would be put in order at every step."""
    shared = model.generate(**source, **GREEDY, **options, return_dict_in_generate=True)
    cross = shared.past_key_values.cross_attention_cache
    assert [len(layer.states["key"]) for layer in cross.layers] == [2, 2]
    assert len(cross.layers[0].states["row"]) == 2 * options["num_beams"]
    assert torch.equal(model.generate(**source, **GREEDY, **options, use_cache=False), shared.sequences)
    monkeypatch.setattr(type(model), "_expand_inputs_for_generation", GenerationMixin._expand_inputs_for_generation)
    copied = model.generate(**source, **GREEDY, **options, return_dict_in_generate=True)
    assert torch.equal(copied.sequences, shared.sequences)


@torch.no_grad()
def test_rows_of_a_cache_in_any_order(model, source, tokens):
    """Rows that change places, or become several, ask the source that they asked."""
    answer = tokens[:, :5]
    cache = model(**source, decoder_input_ids=answer, use_cache=True).past_key_values
    encoded = model.model.encoder(**source)
    after = {"encoder_outputs": encoded, "decoder_input_ids": tokens[:, 5:6]}
    expected = model(**after, past_key_values=fork(cache)).logits
    cache = fork(cache, 2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 1]))
    cache.batch_select_indices(torch.tensor([0, 3, 1]))
    rows = torch.tensor([1, 0, 0])
    after["decoder_input_ids"] = after["decoder_input_ids"][rows]
    assert_close(model(**after, past_key_values=cache).logits, expected[rows], **EXACT)
    cache.reset()
    again = model(**source, decoder_input_ids=answer[:, :1], past_key_values=cache).logits
    assert_close(again, model(**source, decoder_input_ids=answer[:, :1]).logits, **EXACT)


@torch.no_grad()
def test_segments_of_the_callers_reach_generation(model, source):
    for name in ROW.heads:
        assert "segment_starts" in inspect.signature(ROW.load(name).forward).parameters
    generated = model.generate(**source, **GREEDY)
    logits = model(**source, decoder_input_ids=generated).logits
    assert torch.equal(generated[:, 1:], logits[:, :-1].argmax(-1))
    plain = {name: value for name, value in source.items() if name != "segment_starts"}
    assert (model(**plain, decoder_input_ids=generated).logits - logits).abs().max() > 0.1


@torch.no_grad()
def test_a_step_costs_by_segments():
    """Of a plain encoder-decoder a step is as much more as its source is longer; here a segment more is a product with
    its key, which is 2 x 2 x 32 numbers in two layers, and nothing else."""
    fields = {"max_position_embeddings": 4096, "segment_lengths": [64], "encoder_layer_types": None}
    steps = {}
    for name in ("hat_encoder_decoder", "encoder_decoder"):
        case = Case(find(name), CASE.head)
        model = case.build(torch.float32, **(fields if name == ROW.name else {}))
        model.set_attn_implementation("eager")
        for length in (1024, 4096):
            encoded = (torch.randn(1, length, 32),)
            told = {"encoder_outputs": encoded, "decoder_input_ids": some_tokens(1, 1)}
            told["past_key_values"] = model(**told, use_cache=True).past_key_values
            with FlopCounterMode(display=False) as counter:
                model(**told)
            steps[name, length] = counter.get_total_flops()
    assert steps["hat_encoder_decoder", 4096] - steps["hat_encoder_decoder", 1024] == 2 * 2 * 32 * 48
    assert steps["encoder_decoder", 4096] - steps["encoder_decoder", 1024] == 2 * 4 * 32 * 3072


def test_caches_of_others_take_it_in(model, source, tokens):
    """A cache that a user made, as the error message of a wrong one says."""
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache())
    with torch.no_grad():
        found = model(**source, decoder_input_ids=tokens[:, :5], past_key_values=cache).logits
        assert_close(found, model(**source, decoder_input_ids=tokens[:, :5]).logits, **EXACT)
