"""Bad input gets an error of the right type that names the cause and the remedy, before the mathematics starts."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import DynamicCache

import hf_arch
from hf_arch.modeling.skeleton.checks import cache_layers
from promises import ROWS


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_size": 31}, "31 is not a multiple of num_attention_heads 4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"hidden_act": "smile"}, "'smile' is unknown"),
        ({"pad_token_id": 96}, "pad_token_id 96 is not in the vocabulary of 96"),
        ({"feed_forward_types": ["dense"]}, "feed_forward_types has 1 entries for"),
        ({"feed_forward_types": ["gated", "grated"]}, "grated.*knows"),
        ({"layer_types": ["hearsay"] * 2}, "hearsay"),
    ],
)
def test_contradictory_configs_fail_at_construction(model_case, fields, message):
    with pytest.raises(StrictDataclassError, match=message):  # as transformers' own configs do
        model_case.config(**fields)


def test_wrong_calls_are_refused(model_case, tokens):
    model = model_case.build()
    embeds = model.get_input_embeddings()(tokens)
    answer = {"decoder_input_ids": tokens} if model_case.answers else {}  # which may be longer than its source
    for inputs, message in (
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": tokens, "inputs_embeds": embeds}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": tokens[0]}, r"Expected input_ids \[batch, length\]"),
        ({"input_ids": tokens[:, :0]}, "The text is empty"),
        ({"input_ids": tokens + 96}, "vocabulary has 96"),
        ({"input_ids": tokens - 96}, "vocabulary has 96"),
        ({"input_ids": tokens, "attention_mask": torch.ones(2, 69)}, r"attention_mask is \[2, 69\] for 2 rows of 70"),
        ({"input_ids": tokens, "position_ids": torch.arange(69)[None]}, "position_ids has 69 entries for 70"),
        ({"input_ids": tokens, "labels": tokens[:, 1:]} | answer, r"labels are \[2, 69\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs)


@torch.no_grad()
def test_a_cache_of_another_model_is_refused(row_case, tokens):
    model = row_case.build()
    layers = row_case.config().num_hidden_layers + 1
    deeper = row_case.build(num_hidden_layers=layers, layer_types=None, feed_forward_types=None)
    cache = deeper(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=f"past_key_values holds {layers} layers.*is of another model"):
        model(tokens, past_key_values=cache)
    for other in ROWS:
        held = [cache_layers(kind) for config in (other.config(), model.config) for kind in config.layer_types[:1]]
        if held[0] != held[1]:
            cache = other.build()(tokens, use_cache=True).past_key_values
            with pytest.raises(ValueError, match="is of another model"):
                model(tokens, past_key_values=cache)


def test_a_cache_made_without_the_config_is_explained(tokens):
    model = hf_arch.find("retnet").load("ForCausalLM")(hf_arch.find("retnet").tiny_config())
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
        model(tokens, past_key_values=DynamicCache())


def test_a_mask_covers_the_cached_tokens_too(row_case, tokens):
    model = row_case.decoder()
    cache = model(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="after 70 cached ones: the mask covers both"):
        model(tokens[:, :1], attention_mask=torch.ones(2, 1), past_key_values=cache)


def test_heads_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match="retnet has no ForMaskedLM; it has Config, Model"):
        hf_arch.find("retnet").load("ForMaskedLM")
