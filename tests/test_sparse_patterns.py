"""Strided, fixed and dilated attention equal their definitions, over lengths, padding and packing, compare no more than
the patterns show, and hold no more than a part of it at once."""

import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hf_arch.modeling.ops.attention_kernels import written_out
from hf_arch.modeling.ops.band import make_band
from hf_arch.modeling.ops.banded_attention import banded_attention
from hf_arch.modeling.ops.dilated_attention import dilated_attention, times_shown
from hf_arch.modeling.ops.documents import document_places
from hf_arch.modeling.ops.factorized_attention import fixed_attention, sees_fixed, sees_strided, strided_attention

CLOSE = {"atol": 1e-10, "rtol": 1e-10}
LENGTHS = (1, 2, 7, 8, 33, 300)
PATTERNS = {
    "strided 1": (strided_attention, (1,)),
    "strided 7": (strided_attention, (7,)),
    "strided 32": (strided_attention, (32,)),
    "fixed 1": (fixed_attention, (1, 1)),
    "fixed 7": (fixed_attention, (7, 2)),
    "fixed 32": (fixed_attention, (32, 32)),
    "dilated": (dilated_attention, ([8], [1])),
    "dilated far": (dilated_attention, ([4, 12, 60], [1, 3, 5])),
    "dilated wide": (dilated_attention, ([300, 600], [1, 2])),
}


def count(attend, sizes, query_place, key_place, heads: int) -> torch.Tensor:
    """The definition: how often a key is shown, [batch, heads or 1, queries, keys]."""
    if attend is dilated_attention:
        return times_shown(query_place, key_place, heads, *sizes)
    sees = {strided_attention: sees_strided, fixed_attention: sees_fixed}[attend]
    return sees(query_place[:, None, :, None], key_place[:, None, None], *sizes).long()


def tensors(length: int, heads: int = 4, key_heads: int = 2, grad: bool = False) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(length)
    sizes = (heads, key_heads, key_heads)
    return [torch.randn(2, length, size, 6, generator=draw, dtype=torch.float64).requires_grad_(grad) for size in sizes]


def dense(query, key, value, shown) -> torch.Tensor:
    key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], 2) for x in (key, value))
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * query.shape[-1] ** -0.5 + shown.double().log()
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), value)


def expected_of(name: str, tokens, documents: torch.Tensor) -> torch.Tensor:
    attend, sizes = PATTERNS[name]
    place = document_places(documents)
    shown = count(attend, sizes, place, place, 4) * (documents[:, :, None] == documents[:, None])[:, None]
    shown = torch.where((documents == 0)[:, None, :, None], torch.eye(documents.shape[1]).bool(), shown)
    return dense(*tokens, shown)


def some_documents(kind: str, length: int) -> torch.Tensor:
    documents, column = torch.ones(2, length, dtype=torch.long), torch.arange(length)
    if kind == "left":
        documents[0, : length // 3] = 0
    if kind == "all of a row":
        documents[0] = 0
    if kind == "packed":
        documents = 1 + (column > length // 4).long() + (column > length // 2).long().expand(2, -1)
    if kind == "everywhere":  # padding between real tokens, and within packed documents
        documents = (1 + (column > length // 2).long().expand(2, -1)) * (torch.stack((column % 5, column % 3)) > 0)
    return documents


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "left", "all of a row", "packed", "everywhere"])
@pytest.mark.parametrize("name", PATTERNS)
def test_fast_forms_equal_their_definitions(name, kind):
    attend, sizes = PATTERNS[name]
    for length in LENGTHS:
        tokens, documents = tensors(length), some_documents(kind, length)
        found = attend(*tokens, *sizes, documents=None if kind == "none" else documents)
        assert_close(found[documents > 0], expected_of(name, tokens, documents)[documents > 0], **CLOSE)
        assert not found[documents == 0].any()


@pytest.mark.parametrize("name", ["strided 7", "fixed 7", "dilated far"])
def test_gradients_equal_those_of_the_definition(name):
    attend, sizes = PATTERNS[name]
    leaves, documents = tensors(75, grad=True), some_documents("everywhere", 75)
    expected = torch.autograd.grad(expected_of(name, leaves, documents)[documents > 0].pow(2).sum(), leaves)
    found = torch.autograd.grad(attend(*leaves, *sizes, documents=documents).pow(2).sum(), leaves)
    for gradient, wanted in zip(found, expected, strict=True):
        assert_close(gradient, wanted, **CLOSE)


@torch.no_grad()
def test_scores_far_apart_do_not_overflow():
    query, key, value = (x.float() * 200 for x in tensors(75))
    for attend, sizes in (PATTERNS["strided 7"], PATTERNS["dilated far"]):
        place = torch.arange(75)[None]
        wide = dense(query.double(), key.double(), value.double(), count(attend, sizes, place, place, 4))
        assert_close(attend(query, key, value, *sizes).double(), wide, atol=1e-2, rtol=1e-4)


@torch.no_grad()
def test_a_pattern_that_shows_all_is_full_attention():
    query, key, value = tensors(100, key_heads=4)
    full = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), is_causal=True
    ).transpose(1, 2)
    for attend, sizes in (
        (strided_attention, (100,)),
        (fixed_attention, (100, 1)),
        (fixed_attention, (10, 10)),
        (dilated_attention, ([100], [1])),
    ):
        assert_close(attend(query, key, value, *sizes), full, **CLOSE)


def test_dropout_leaves_out_weights():
    query, key, value = (torch.ones_like(x) for x in tensors(75))
    for attend, sizes in (PATTERNS["strided 7"], PATTERNS["fixed 7"], PATTERNS["dilated far"]):
        torch.manual_seed(0)
        found = attend(query, key, value, *sizes, dropout=0.5)
        assert found.std() > 0.1 and abs(found.mean() - 1) < 0.1


def largest_and_operations(attend, sizes, length: int) -> tuple[int, int]:
    query, key, value = tensors(length)
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    kernel = {"kernel": written_out} if attend is fixed_attention else {}
    with FlopCounterMode(display=False) as counter:
        attend(query, key, value, *sizes, **kernel)
    with Watch():
        attend(query, key, value, *sizes)
    return max(made), counter.get_total_flops()


@torch.no_grad()
@pytest.mark.parametrize(
    "attend, sizes, power",
    [
        (strided_attention, lambda root: (root,), 1.5),
        (fixed_attention, lambda root: (root, max(1, root // 16)), 1.5),
        (dilated_attention, lambda root: ([64, 256], [1, 4]), 1.0),
    ],
    ids=["strided", "fixed", "dilated"],
)
def test_operations_grow_as_the_paper_says_and_memory_as_the_text(attend, sizes, power):
    (small, short), (large, long) = (largest_and_operations(attend, sizes(root), root**2) for root in (20, 80))
    assert math.log(long / short) / math.log(16) < power + 0.06
    assert large <= 16 * small
    assert large < 2**23  # all pairs of the longer text are 40 times as many


@torch.no_grad()
def test_strided_attention_compares_little_more_than_it_shows():
    root = 64
    _, operations = largest_and_operations(strided_attention, (root,), root**2)
    place = torch.arange(root**2)
    pairs = sees_strided(place[:, None], place, root).sum().item()
    shown = 2 * 4 * pairs * 2 * 2 * 6  # rows, heads; two products of 6 numbers for each pair
    assert shown < operations < 2.1 * shown


@torch.no_grad()
@pytest.mark.parametrize("key_heads", [2, 4])
def test_landmarks_can_be_asked_by_other_queries(key_heads):
    query, key, value = tensors(90, key_heads=key_heads)
    other, documents = tensors(90)[0].flip(1), some_documents("everywhere", 90)
    place = document_places(documents)
    marked = (place < 3) & (documents > 0)
    band = make_band(query, 8, 0, 1, documents, marked)
    found, _ = banded_attention(query, key, value, band, landmark_query=other)
    wide = [x.repeat_interleave(4 // key_heads, 2) for x in (key, value)]
    near, far = (torch.einsum("bihd,bjhd->bhij", x, wide[0]) * 6**-0.5 for x in (query, other))
    scores = torch.where(marked[:, None, None], far, near)
    distance = place[:, :, None] - place[:, None]
    seen = (distance >= 0) & ((distance <= 8) | marked[:, None]) & (documents[:, :, None] == documents[:, None])
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), wide[1])
    assert_close(found[documents > 0], expected[documents > 0], **CLOSE)
