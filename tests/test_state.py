"""Promises 2 to 4: what a row answers depends on its real tokens and their positions alone, however they come."""

import pytest
import torch
from torch.testing import assert_close

from promises import EXACT, new_cache


@torch.no_grad()
def test_steps_with_a_cache_equal_one_pass(decoder, tokens):
    whole = decoder(tokens, use_cache=False).logits
    step = decoder(tokens[:, :66], use_cache=True)
    logits = [step.logits]
    for t in range(66, tokens.shape[1]):
        step = decoder(tokens[:, t : t + 1], past_key_values=step.past_key_values)
        logits.append(step.logits)
    assert_close(torch.cat(logits, dim=1), whole, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1, 1, 68), (33, 37), (64, 1, 5)], ids=str)
def test_a_prompt_in_pieces_equals_the_whole(decoder, tokens, cuts):
    cache = new_cache(decoder)
    pieces = [decoder(piece, past_key_values=cache).logits for piece in tokens.split(cuts, dim=1)]
    assert_close(torch.cat(pieces, dim=1), decoder(tokens).logits, **EXACT)


@torch.no_grad()
def test_the_future_does_not_matter(decoder, tokens):
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 7) % 96
    logits, other = decoder(tokens).logits, decoder(changed).logits
    assert_close(other[:, :40], logits[:, :40], **EXACT)
    assert (other[:, 40:] - logits[:, 40:]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("given_positions", [False, True])
def test_left_padding_does_not_matter(decoder, tokens, given_positions):
    padded, mask = torch.cat((tokens[:, :5], tokens), dim=1), torch.ones(2, 75, dtype=torch.long)
    mask[:, :5] = 0  # padded with real tokens: the pad embedding is all zeros and hides faults
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if given_positions else {}
    assert_close(decoder(padded, attention_mask=mask, **positions).logits[:, 5:], decoder(tokens).logits, **EXACT)


@torch.no_grad()
def test_right_padding_does_not_matter(decoder, tokens):
    padded, mask = torch.cat((tokens, tokens[:, :9]), dim=1), torch.ones(2, 79, dtype=torch.long)
    mask[:, 70:] = 0
    assert_close(decoder(padded, attention_mask=mask).logits[:, :70], decoder(tokens).logits, **EXACT)


@torch.no_grad()
def test_right_padding_does_not_enter_the_state(decoder_case, decoder, tokens):
    padded, mask = torch.cat((tokens, tokens[:, :9]), dim=1), torch.ones(2, 85, dtype=torch.long)
    mask[:, 70:79] = 0
    more = tokens[:, 20:26].flip(0)  # the text that goes on after the padding
    cache = decoder(padded, attention_mask=mask[:, :79], use_cache=True).past_key_values
    logits = decoder(more, attention_mask=mask, past_key_values=cache).logits
    with decoder_case.keeps("padding does not enter the state"):
        assert_close(logits, decoder(torch.cat((tokens, more), dim=1)).logits[:, 70:], **EXACT)


@torch.no_grad()
def test_padding_in_the_first_pieces_does_not_matter(decoder, tokens):
    padded, mask = torch.cat((tokens[:, :3], tokens), dim=1), torch.ones(2, 73, dtype=torch.long)
    mask[:, :3] = 0
    cache, logits, seen = new_cache(decoder), [], 0
    for piece in padded.split((1, 2, 10, 60), dim=1):
        seen += piece.shape[1]
        logits.append(decoder(piece, attention_mask=mask[:, :seen], past_key_values=cache).logits)
    assert_close(torch.cat(logits, dim=1)[:, 3:], decoder(tokens).logits, **EXACT)


@torch.no_grad()
def test_batch_mates_do_not_matter(decoder, tokens):
    mask = torch.ones_like(tokens)
    mask[1, 41:] = 0
    together = decoder(tokens, attention_mask=mask).logits
    assert_close(together[:1], decoder(tokens[:1]).logits, **EXACT)
    assert_close(together[1:, :41], decoder(tokens[1:, :41]).logits, **EXACT)


PACKED = (30, 3, 37)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("padding", [0, 6])
def test_packed_documents_do_not_meet(decoder, tokens, use_cache, padding):
    alone = [decoder(piece).logits for piece in tokens.split(PACKED, dim=1)]
    packed = torch.cat((tokens, tokens[:, :padding]), dim=1)
    positions = torch.cat([torch.arange(size) for size in (*PACKED, padding)])[None].expand(2, -1)
    mask = None
    if padding:
        mask = torch.ones_like(packed)
        mask[:, -padding:] = 0
    logits = decoder(packed, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits
    assert_close(logits[:, :70], torch.cat(alone, dim=1), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("more", [1, 9, 40])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_of_an_encoder_does_not_matter(encoder, tokens, more, side, attention):
    encoder.set_attn_implementation(attention)
    pieces = (tokens[:, :more], tokens) if side == "left" else (tokens, tokens[:, :more])
    real = slice(more, None) if side == "left" else slice(None, 70)
    mask = torch.zeros(2, 70 + more, dtype=torch.long)
    mask[:, real] = 1
    padded = encoder(torch.cat(pieces, dim=1), attention_mask=mask).logits[:, real]
    assert_close(padded, encoder(tokens).logits, **EXACT)


@torch.no_grad()
def test_an_encoder_sees_both_ways_and_no_other_document(encoder, tokens):
    for place, other in ((0, 69), (69, 0)):
        changed = tokens.clone()
        changed[:, place] = 3 + changed[:, place] % 90
        assert (encoder(changed).logits[:, other] - encoder(tokens).logits[:, other]).abs().max() > 1e-4
    positions = torch.cat([torch.arange(size) for size in PACKED])[None].expand(2, -1)
    alone = [encoder(piece).logits for piece in tokens.split(PACKED, dim=1)]
    assert_close(encoder(tokens, position_ids=positions).logits, torch.cat(alone, dim=1), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_classifier_reads_the_right_token_under_padding(head_case, tokens, side):
    if head_case.head != "ForSequenceClassification":
        return
    model = head_case.build()
    pieces = (tokens[:, :8], tokens) if side == "left" else (tokens, tokens[:, :8])
    mask = torch.zeros(2, 78, dtype=torch.long)
    mask[:, 8:] = 1 if side == "left" else mask[:, 8:]
    mask[:, :70] = 1 if side == "right" else mask[:, :70]
    assert_close(model(torch.cat(pieces, dim=1), attention_mask=mask).logits, model(tokens).logits, **EXACT)
