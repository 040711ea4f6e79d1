"""The second skeleton carries what no row shows alone: firing by the text, widths by level, mixers side by side."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import CompileConfig, DynamicCache

import hierarchy_toy
from hf_arch.modeling.ops.firing import fired_rows
from promises import EXACT, some_tokens

GREEDY = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def toy():
    return hierarchy_toy.build()


@torch.no_grad()
def test_rows_fire_at_places_of_their_own(toy):
    tokens, counts = some_tokens(3), []
    cache = toy(tokens, use_cache=True).past_key_values
    counts = cache.layers[0].read("memory_level_counts")
    assert counts[:, 0].tolist() == [70] * 3
    assert (counts[:, 1] < 70).all() and (counts[:, 2] < counts[:, 1]).all() and len(set(counts[:, 1].tolist())) > 1


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1, 1, 68), (33, 37), (64, *[1] * 6)], ids=str)
def test_pieces_and_steps_equal_the_whole(toy, cuts):
    tokens = some_tokens(3)
    whole, cache = toy(tokens, use_cache=False).logits, DynamicCache(config=toy.config)
    pieces = [toy(piece, past_key_values=cache).logits for piece in tokens.split(cuts, dim=1)]
    assert_close(torch.cat(pieces, dim=1), whole, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
def test_padding_packing_and_mates_do_not_matter(toy, use_cache):
    tokens = some_tokens(3)
    alone = [toy(piece).logits for piece in tokens.split((30, 3, 37), dim=1)]
    positions = torch.cat([torch.arange(size) for size in (30, 3, 37)])[None].expand(3, -1)
    packed = toy(tokens, position_ids=positions, use_cache=use_cache)
    assert_close(packed.logits, torch.cat(alone, dim=1), **EXACT)
    if use_cache:
        follow = torch.cat((tokens[:, 33:], tokens[:, :4]), dim=1)
        after = toy(tokens[:, :4], past_key_values=packed.past_key_values).logits
        assert_close(after, toy(follow).logits[:, -4:], **EXACT)
    mask = torch.ones(3, 70, dtype=torch.long)
    mask[0, :9], mask[1, 50:], mask[2, 20:30] = 0, 0, 0
    logits = toy(tokens, attention_mask=mask, use_cache=use_cache).logits
    for row in range(3):
        real = mask[row].bool()
        assert_close(logits[row, real], toy(tokens[row, real][None]).logits[0], **EXACT)


@torch.no_grad()
def test_layers_of_every_width_attend_as_asked(toy):
    """Their configs see the model's own."""
    tokens, copied = some_tokens(3), copy.deepcopy(toy)
    copied.set_attn_implementation("eager")
    narrow = copied.float()(tokens).logits  # transformers' eager softmax turns float64 masks into nan
    assert copied.model.layers[4].mixer is not toy.model.layers[4].mixer
    assert {layer.mixer.config._attn_implementation for layer in copied.model.layers[1::8]} == {"eager"}
    assert_close(narrow, toy(tokens).logits.float(), atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_generation_by_every_cache(toy):
    tokens, mask = some_tokens(3), torch.ones(3, 70, dtype=torch.long)
    mask[1, :9] = 0
    told = {"input_ids": tokens, "attention_mask": mask} | GREEDY
    expected = toy.generate(**told, use_cache=False)
    compiled = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiled._compile_all_devices = True
    for options in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 7}):
        assert torch.equal(toy.generate(**told, **options), expected), options
    torch._dynamo.reset()
    found = toy.generate(**told, cache_implementation="static", compile_config=compiled)
    assert torch.equal(found, expected)
    beams = toy.generate(**told | {"num_beams": 3}, use_cache=False)
    assert torch.equal(toy.generate(**told | {"num_beams": 3}), beams)


@torch.no_grad()
def test_assisted_decoding_goes_back(toy):
    prompt = some_tokens(1, 20).repeat(1, 2)
    expected = toy.generate(prompt, **GREEDY)
    assert torch.equal(toy.generate(prompt, **GREEDY, prompt_lookup_num_tokens=4), expected)


@torch.no_grad()
def test_a_step_computes_levels_where_rows_fire(toy):
    tokens, rows = some_tokens(3), []
    cache = toy(tokens[:, :60], use_cache=True).past_key_values
    hook = toy.model.layers[4].register_forward_hook(lambda module, given, answer: rows.append(len(answer)))
    for t in range(60, 70):
        before = cache.layers[0].read("memory_level_counts")[:, 2]
        rows.clear()
        toy(tokens[:, t : t + 1], past_key_values=cache)
        fired = (cache.layers[0].read("memory_level_counts")[:, 2] - before).sum()
        assert sum(rows) == fired
    hook.remove()


def test_every_item_uses_the_last_that_fired():
    fires = torch.tensor([[0, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    made = torch.tensor([[10, 11], [20, 0]])[..., None]
    held = torch.tensor([1, 2, 3])[:, None]
    for most in (None, 3):
        fired = fired_rows(fires, most)
        if most:
            made = torch.tensor([[10, 11, 0], [0, 0, 0], [20, 0, 0]])[..., None]
        assert fired.spread(made, held).squeeze(-1).tolist() == [[1, 1, 10, 10, 11], [2] * 5, [20] * 5]
        assert fired.last(made, held).squeeze(-1).tolist() == [11, 2, 20]
    parts = torch.tensor([[0, 1, 0, 1, 0]])
    held, made = torch.stack((held, -held), 1), torch.stack((made, -made), 2)
    found = fired.spread(made, held, parts).squeeze(-1)
    assert found.tolist() == [[1, -1, 10, -10, 11], [2, -2, 2, -2, 2], [20, -20, 20, -20, 20]]
