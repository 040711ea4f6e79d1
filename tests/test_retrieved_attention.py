"""Retrieval of blocks: equal to its definition, whatever the lengths; what it finds, and what it costs."""

import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hf_arch.modeling.ops import retrieved_attention as op
from hf_arch.modeling.ops.retrieved_attention import (
    Retrieval,
    bounds_of,
    dense_weights_by_retrieval,
    retrieved_attention,
    step_of_retrieval,
    text_of,
    visible_by_retrieval,
)

CLOSE = {"atol": 1e-11, "rtol": 1e-10}
RULES = [Retrieval(9, 3, 4, 2), Retrieval(5, 0, 5, 1), Retrieval(1, 1, 1, 3), Retrieval(33, 40, 8, 100)]


def tensors(length: int, key_heads: int = 2, grad: bool = False, dim: int = 6) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(length)
    sizes = (4, key_heads, key_heads)
    made = [torch.randn(2, size, length, dim, generator=draw, dtype=torch.float64) for size in sizes]
    return [x.requires_grad_(grad) for x in made]


def expected_of(query, key, value, place, rule):
    weights = dense_weights_by_retrieval(query, key, place, rule, scale=0.4)
    return weights @ value.repeat_interleave(4 // value.shape[1], dim=1)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("key_heads", [2, 4])
@pytest.mark.parametrize("length", [1, 4, 9, 10, 33, 70, 300])
def test_both_forms_are_the_definition(rule, length, key_heads, monkeypatch):
    monkeypatch.setattr(op, "QUERIES_OF_CHUNK", 16)
    monkeypatch.setattr(op, "QUERIES_OF_SPAN", 128)
    (query, key, value), place = tensors(length, key_heads), torch.arange(length)[None]
    expected, text = expected_of(query, key, value, place, rule), text_of(key, value, rule.block)
    assert_close(retrieved_attention(query, text, place, rule, scale=0.4), expected, **CLOSE)
    for n in {0, length // 2, length - 1}:
        step = step_of_retrieval(query[:, :, n : n + 1], text, place[:, n : n + 1], rule, scale=0.4)
        assert_close(step, expected[:, :, n : n + 1], **CLOSE)
    late = torch.stack((place[0, length // 2 :], place[0, length // 2 :].clamp(max=length - 2))).clamp(min=0)
    asked = torch.cat((query[:1, :, late[0]], query[1:, :, late[1]]))  # rows that stand at places of their own
    found = torch.cat((expected[:1, :, late[0]], expected[1:, :, late[1]]))
    assert_close(retrieved_attention(asked, text, late, rule, scale=0.4), found, **CLOSE)


@pytest.mark.parametrize("key_heads", [2, 4])
def test_gradients_are_those_of_the_definition(key_heads):
    made, rule, place = tensors(70, key_heads, grad=True), RULES[0], torch.arange(70)[None]
    weight = torch.randn(2, 4, 70, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = retrieved_attention(made[0], text_of(*made[1:], rule.block), place, rule, scale=0.4)
    gradients = torch.autograd.grad((found * weight).sum(), made)
    assert_close(gradients, torch.autograd.grad((expected_of(*made, place, rule) * weight).sum(), made), **CLOSE)


def test_all_blocks_are_full_attention():
    (query, key, value), place = tensors(150, 4), torch.arange(150)[None]
    found = retrieved_attention(query, text_of(key, value, 8), place, Retrieval(8, 0, 8, 19), scale=0.4)
    full = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.4)
    assert_close(found, full, **CLOSE)


def test_a_query_sees_the_blocks_with_the_greatest_bounds():
    """By loops: as many keys as there are to see, of no later token, and no block left out that may hold more."""
    (query, key, _), rule = tensors(60, 2), Retrieval(9, 3, 4, 2)
    seen = visible_by_retrieval(query, key, torch.arange(60)[None], rule)
    for row, head, t in ((0, 0, 5), (0, 3, 20), (1, 1, 40), (1, 2, 59)):
        q, k = query[row, head, t], key[row, head // 2]
        before = [list(range(b, b + 4)) for b in range(0, max(0, t - 9 + 1), 4)]
        bound = {n: torch.maximum(q * k[b].amax(0), q * k[b].amin(0)).sum() for n, b in enumerate(before)}
        assert all(bound[n] >= (k[b] @ q).max() for n, b in enumerate(before))
        best = sorted(bound, key=lambda n: -bound[n])[:2]
        expected = {*range(max(0, t - 8), t + 1), *range(min(3, t + 1)), *(j for n in best for j in before[n])}
        assert set(seen[row, head, t].nonzero().flatten().tolist()) == expected
    blocks = key.unflatten(2, (-1, 4))
    assert_close(bounds_of(blocks), torch.cat((blocks.max(3).values, blocks.min(3).values), dim=-1))


def test_a_needle_is_found_where_a_window_finds_none():
    length, rule, dim = 4000, Retrieval(64, 4, 32, 2), 32
    draw = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 1, 2, length, dim, generator=draw)
    for place in (40, 777, 2048, 3500):
        key[:, :, place] *= 3
        query = key[:, :, place : place + 1].repeat(1, 1, 2, 1)
        asked = torch.tensor([[length - 2, length - 1]])
        text = text_of(key, value, rule.block)
        found = retrieved_attention(query, text, asked, rule, scale=1.0)
        assert_close(found, value[:, :, [place, place]], atol=1e-3, rtol=0)
        alone = retrieved_attention(query, text, asked, rule._replace(count=0), scale=1.0)
        assert (alone - value[:, :, [place, place]]).square().mean() > 1


def largest_and_operations(call, *held: torch.Tensor) -> tuple[int, int]:
    """Of a call: the most numbers that it puts into a tensor, beside those that are held; its operations."""
    made, there = [], {x.untyped_storage().data_ptr() for x in held}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            new = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
            made.extend(x.numel() for x in new if x.untyped_storage().data_ptr() not in there)
            return out

    with FlopCounterMode(display=False) as counter:
        call()
    with Watch():
        call()
    return max(made), counter.get_total_flops()


@torch.no_grad()
def test_a_step_reads_as_much_of_a_long_text_and_a_text_holds_no_pairs():
    rule, steps, texts = Retrieval(16, 4, 16, 4), [], []
    for length in (512, 4096):
        query, key, value = tensors(length)
        text, place = text_of(key, value, rule.block), torch.arange(length)[None]
        parts = query[:, :, -1:], text, place[:, -1:], rule
        steps.append(largest_and_operations(lambda parts=parts: step_of_retrieval(*parts, scale=1.0), *text))
        parts = query, text, place, rule
        texts.append(largest_and_operations(lambda parts=parts: retrieved_attention(*parts, scale=1.0)))
    assert steps[1][0] == steps[0][0] == 2 * 4 * (16 + 4 + 4 * 16) * 6  # the keys that it sees
    bounds = 2 * 2 * 4 * 12 * (4096 - 512) // 16
    assert steps[1][1] - steps[0][1] == bounds
    scored = 2 * bounds / (4096 - 512) * 4096 * 4096 / 2  # of all queries
    assert math.log((texts[1][1] - scored) / texts[0][1], 8) < 1.1
    assert texts[1][0] < 10 * texts[0][0]
