"""Kinds of segment: embeddings as in BERT, and what is done with `token_type_ids` elsewhere."""

import inspect

import pytest
import torch
from laboratory import BIAS_FREE, ROW, build
from test_transformer import heard

from promises import EXACT, some_tokens


@torch.no_grad()
def test_segments_are_added_before_the_norm_and_the_first_is_meant_where_nothing_is_said():
    model, tokens = build(type_vocab_size=3, embedding_norm=True, **BIAS_FREE), some_tokens()
    segments = torch.arange(70).expand(2, -1) % 3
    found, _, normed = heard(model.embed_norm, lambda: model(tokens, token_type_ids=segments))
    torch.testing.assert_close(found, model.embed_tokens(tokens) + model.embed_segments(segments), **EXACT)
    assert torch.equal(model(tokens)[0], model(tokens, token_type_ids=segments * 0)[0])
    assert (model(tokens)[0] - model(tokens, token_type_ids=segments)[0]).abs().max() > 0.1


@torch.no_grad()
def test_a_model_without_segments_takes_what_tokenizers_send():
    model, tokens = build(), some_tokens()
    assert torch.equal(model(tokens)[0], model(tokens, token_type_ids=tokens * 0)[0])


@pytest.mark.parametrize("head", [head for head in ROW.heads if head != "Model"])
def test_heads_name_what_the_trainer_and_generate_should_hand_over(head):
    """Neither passes on a column that the signature does not name."""
    names = inspect.signature(ROW.load(head).forward).parameters
    assert "token_type_ids" in names
    assert head != "ForCausalLM" or {"prefix_length", "prefix_mask"} <= set(names)


def test_generation_takes_what_tokenizers_send():
    model, tokens = build("ForCausalLM"), some_tokens(length=10)
    told = {"attention_mask": tokens * 0 + 1, "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(tokens, token_type_ids=tokens * 0, **told), model.generate(tokens, **told))
