"""Attention to the tokens of chosen segments: the fast forms are the definition, and that is the paper's."""

import pytest
import torch
from torch.testing import assert_close

from hf_arch.modeling.ops import hierarchical_attention as op
from promises import EXACT

SIZES = {
    "whole": [[6] * 9, [6] * 9],
    "ragged": [[3, 1, 6, 2, 5, 4, 1, 1, 2], [6, 2, 1, 0, 0, 0, 0, 0, 0]],
    "one": [[5], [2]],
}


def asked(sizes="ragged", queries=40, groups=2, row=(0, 1), dtype=torch.float64):
    """(query, asking, source) of four heads, where places that hold no token hold numbers all the same."""
    torch.manual_seed(0)
    sizes = torch.tensor(SIZES[sizes])
    query, asking = (torch.randn(len(row), 4, queries, 8, dtype=torch.float64) for _ in range(2))
    key, value = (torch.randn(2, 4 // groups, sizes.shape[1], 6, 8, dtype=torch.float64) for _ in range(2))
    leading = torch.randn(2, 4 // groups, sizes.shape[1], 8, dtype=torch.float64)
    tensors = [x.to(dtype).requires_grad_() for x in (query, asking, key, value, leading)]
    return *tensors[:2], op.Source(*tensors[2:], sizes, torch.tensor(row))


def slowly(query, asking, source, count, scale):
    """A loop over rows, heads and queries: P_w P_s normed again (Nallapati et al., 2016, section 2.4), where P_s is the
    attention to the chosen segments, and P_w that to their tokens."""
    answers = torch.zeros_like(query)
    groups = query.shape[1] // source.key.shape[1]
    for row, head, at in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        document, of = int(source.row[row]), head // groups
        sizes = [size for size in source.sizes[document].tolist() if size]
        of_segments = torch.stack([source.leading[document, of, s] @ asking[row, head, at] for s in range(len(sizes))])
        chosen = of_segments.topk(min(count, len(sizes))).indices.tolist()
        p_s = (of_segments[chosen] * scale).softmax(0)
        keys, values = (torch.cat([x[document, of, s, : sizes[s]] for s in chosen]) for x in (source.key, source.value))
        p_w = (keys @ query[row, head, at] * scale).softmax(0)
        both = p_w * p_s.repeat_interleave(torch.tensor([sizes[s] for s in chosen]))
        answers[row, head, at] = (both / both.sum()) @ values
    return answers


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3, 9, 20])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_definition_is_the_papers(sizes, count):
    told = asked(sizes, queries=5, row=(1, 0, 0))
    expected = slowly(*told, count, 0.3)
    assert_close(op.dense_hierarchical_attention(*told, count, scale=0.3), expected, **EXACT)


@pytest.mark.parametrize("at_once", [4096, 16])
@pytest.mark.parametrize("count", [1, 3, 20])
@pytest.mark.parametrize("queries", [1, 3, 40, 200])
@pytest.mark.parametrize("sizes", SIZES)
def test_fast_forms_are_the_definition(sizes, queries, count, at_once, monkeypatch):
    """Also of several rows that ask one document, out of order, and in their gradients."""
    monkeypatch.setattr(op, "ASKING_AT_ONCE", at_once)
    query, asking, source = asked(sizes, queries, row=(1, 0, 1))
    leaves, mixture = (query, asking, *source[:3]), torch.randn(query.shape, dtype=query.dtype)
    found = []
    for form in (op.dense_hierarchical_attention, op.hierarchical_attention):
        output = form(query, asking, source, count, scale=0.3)
        found.append((output, *torch.autograd.grad((output * mixture).sum(), leaves)))
    for fast, slow in zip(*found, strict=True):
        assert_close(fast, slow, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [1, 40])
def test_narrow_types_answer_nearly_alike(queries, dtype):
    told, narrow = asked(queries=queries, dtype=torch.float32), asked(queries=queries, dtype=dtype)
    held = []

    def choose(scores, count):
        held.append(op.best_blocks(scores, count))
        return held[0]

    expected = op.hierarchical_attention(*told, 3, scale=0.3, choose=choose)
    output = op.hierarchical_attention(*narrow, 3, scale=0.3, choose=choose)
    assert output.dtype == dtype
    assert (output.float() - expected).std() < 0.02 * expected.std()


@torch.no_grad()
@pytest.mark.parametrize("queries", [1, 2, 40])
def test_what_was_not_chosen_is_not_read(queries):
    query, asking, source = asked("whole", queries)
    expected = op.hierarchical_attention(query, asking, source, 2, scale=0.3)
    chosen = op.best_blocks(op.weigh_segments(asking, source, 0.3), 2)[0]
    chosen = chosen.unflatten(1, (2, 2)).flatten(2)  # by head of keys
    unread = torch.ones(source.key.shape[:3], dtype=torch.bool).scatter(-1, chosen, False)
    assert unread.any() or queries == 40
    key, value = (x.masked_fill(unread[..., None, None], torch.nan) for x in source[:2])
    told = source._replace(key=key, value=value)
    assert_close(op.hierarchical_attention(query, asking, told, 2, scale=0.3), expected, **EXACT)


def test_dropout_keeps_the_mean():
    query, asking, source = asked("whole", 40)
    expected = op.hierarchical_attention(query, asking, source, 3, scale=0.3)
    many = [op.hierarchical_attention(query, asking, source, 3, scale=0.3, dropout=0.2) for _ in range(300)]
    assert (many[0] - many[1]).abs().max() > 0.1
    assert (torch.stack(many).mean(0) - expected).std() < 0.1 * expected.std()
