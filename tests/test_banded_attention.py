"""Banded attention in blocks equals its definition, over lengths, edges of blocks, padding, packing and landmarks, and
costs what is linear in the length."""

import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hf_arch.modeling.ops.attention_kernels import fused, written_out
from hf_arch.modeling.ops.band import make_band, visible_in_band
from hf_arch.modeling.ops.banded_attention import banded_attention, dense_weights

CLOSE = {"atol": 1e-10, "rtol": 1e-10}
BANDS = ((8, 0, 1), (5, 5, 1), (70, 70, 1), (40, 0, 1), (0, 0, 1), (4, 4, 3), (9, 0, 2), (0, 6, 1), (3, 40, 1))
LENGTHS = (1, 2, 32, 33, 130)


def tensors(length: int, heads: int = 4, key_heads: int = 2, grad: bool = False) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(length)
    sizes = (heads, key_heads, key_heads)
    return [torch.randn(2, length, size, 6, generator=draw, dtype=torch.float64).requires_grad_(grad) for size in sizes]


def dense(query, key, value, seen) -> torch.Tensor:
    """The definition: one query after the other head looks at all that is seen."""
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], 2) for x in (key, value))
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen[:, None], -math.inf).softmax(-1), value)


def some_documents(kind: str, length: int) -> torch.Tensor | None:
    documents, column = torch.ones(2, length, dtype=torch.long), torch.arange(length)
    if kind == "left":
        documents[0, : length // 3] = 0
    if kind == "right":
        documents[1, length - length // 3 :] = 0
    if kind == "packed":
        documents = 1 + (column > length // 4).long() + (column > length // 2).long().expand(2, -1)
    if kind == "everywhere":  # padding between real tokens, and within packed documents
        documents = (1 + (column > length // 2).long().expand(2, -1)) * (torch.stack((column % 5, column % 3)) > 0)
    return None if kind == "none" else documents


def some_landmarks(kind: str, length: int) -> torch.Tensor | None:
    found = torch.zeros(2, length, dtype=torch.bool)
    if kind == "first":
        found[:, 0] = True
    if kind == "many":
        found[0, ::7], found[1, length // 2] = True, True
    return None if kind == "without" else found


@pytest.mark.parametrize("landmarks", ["without", "none", "first", "many"])
@pytest.mark.parametrize("documents", ["none", "left", "right", "packed", "everywhere"])
@pytest.mark.parametrize("band", BANDS, ids=str)
@torch.no_grad()
def test_blocks_equal_the_definition(band, documents, landmarks):
    before, after, dilation = band
    for length in LENGTHS:
        query, key, value = tensors(length)
        told, marks = some_documents(documents, length), some_landmarks(landmarks, length)
        whole = torch.ones(2, length, dtype=torch.long) if told is None else told
        seen = visible_in_band(whole, before, after, dilation, marks)
        expected, real = dense(query, key, value, seen), whole > 0
        made = make_band(query, before, after, dilation, told, marks)
        found, _ = banded_attention(query, key, value, made)
        assert_close(found[real], expected[real], **CLOSE)
        if length in (33, 130):
            found, weights = banded_attention(query, key, value, made, kernel=written_out)
            assert_close(found[real], expected[real], **CLOSE)
            seen_weights = dense_weights(weights, made).transpose(1, 2)[real]
            assert_close(seen_weights.sum(-1), torch.ones_like(seen_weights[..., 0]), **CLOSE)
            assert not seen_weights.masked_select(~seen[real][:, None].expand_as(seen_weights)).any()
            assert torch.isfinite(found).all()


@pytest.mark.parametrize("kernel", [fused, written_out])
@pytest.mark.parametrize("band", [(8, 0, 1), (5, 5, 1), (4, 4, 3)], ids=str)
def test_gradients_equal_those_of_the_definition(band, kernel):
    before, after, dilation = band
    query, key, value = leaves = tensors(75, grad=True)
    documents, landmarks = some_documents("everywhere", 75), some_landmarks("many", 75)
    seen, real = visible_in_band(documents, before, after, dilation, landmarks), documents > 0
    expected = torch.autograd.grad(dense(query, key, value, seen)[real].pow(2).sum(), leaves)
    made = make_band(query, before, after, dilation, documents, landmarks)
    found, _ = banded_attention(query, key, value, made, kernel=kernel)
    for gradient, wanted in zip(torch.autograd.grad(found[real].pow(2).sum(), leaves), expected, strict=True):
        assert_close(gradient, wanted, **CLOSE)


def test_a_window_over_all_is_full_attention():
    query, key, value = tensors(100, key_heads=4)
    found, _ = banded_attention(query, key, value, make_band(query, 99, 99))
    full = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    assert_close(found, full.transpose(1, 2), **CLOSE)


def test_operations_and_memory_are_linear_in_the_length():
    def cost(length: int) -> tuple[int, int]:
        query, key, value = tensors(length)
        sizes = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
                return out

        with FlopCounterMode(display=False) as counter:
            banded_attention(query, key, value, make_band(query, 20, 20), kernel=written_out)
        with Watch():
            banded_attention(query, key, value, make_band(query, 20, 20))
        return counter.get_total_flops(), max(sizes)

    (short, small), (long, large) = cost(512), cost(4096)
    assert long == 8 * short and large == 8 * small
    pairs = 2 * 4096 * 4 * 41
    assert long <= 4 * 6 * pairs * 3  # blocks are whole: at most three times the pairs that see each other
