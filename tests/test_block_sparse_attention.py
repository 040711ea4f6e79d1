"""Block-sparse attention equals its definition, over lengths, edges of blocks, padding and packing; the blocks are
those that the paper and the hash say; and it costs what is linear in the length."""

import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hf_arch.modeling.ops.attention_kernels import fused, written_out
from hf_arch.modeling.ops.block_sparse_attention import (
    block_sparse_attention,
    cut_into_blocks,
    dense_block_weights,
    make_pattern,
)
from hf_arch.modeling.ops.random_blocks import BlockChoice

CLOSE = {"atol": 1e-10, "rtol": 1e-10}
ENCODER = BlockChoice(window=3, first=1, last=1, random=2, causal=False, seed=0)
DECODER = BlockChoice(window=3, first=1, last=0, random=2, causal=True, seed=0)
CHOICES = (ENCODER, DECODER, BlockChoice(1, 0, 0, 3, False, 7), BlockChoice(5, 2, 2, 0, False, 0))
CHOICES += (BlockChoice(2, 2, 0, 1, True, 3), BlockChoice(1, 0, 0, 0, True, 0))
LAYER, SIZE, LENGTHS = 3, 4, (1, 3, 4, 9, 61)
WORD = 2**32


def mixed(x: int) -> int:
    x %= WORD
    x = (x ^ x >> 16) * 0x85EBCA6B % WORD
    x = (x ^ x >> 13) * 0xC2B2AE35 % WORD
    return x ^ x >> 16


def blocks_seen(choice: BlockChoice, i: int, count: int) -> set[int]:
    """The definition, of one block of a text of `count` blocks."""
    ends = {j for j in range(count) if j < choice.first or j >= count - choice.last}
    if choice.causal:
        window = set(range(max(0, i - choice.window + 1), i + 1))
        others = set(range(i)) - window - ends
        ends = {j for j in ends if j <= i}
    else:
        if i in ends:
            return set(range(count))
        reach = choice.window // 2
        window = set(range(max(0, i - reach), min(count, i + reach + 1)))
        others = set(range(count)) - window - ends
    row = mixed(mixed(choice.seed + LAYER * 0x9E3779B1) + i)
    chosen = sorted(others, key=lambda j: (mixed(row + j), j), reverse=True)[: choice.random]
    return ends | window | set(chosen)


def visible(choice: BlockChoice, documents: torch.Tensor) -> torch.Tensor:
    """The definition: [batch, length, length], whether a query (row) sees a key. Padding sees itself."""
    seen = torch.diag_embed(documents == 0)
    for row, numbers in enumerate(documents.tolist()):
        for number in set(numbers) - {0}:
            columns = [column for column, of in enumerate(numbers) if of == number]
            count = -(-len(columns) // SIZE)
            for place, query in enumerate(columns):
                blocks = blocks_seen(choice, place // SIZE, count)
                for other, key in enumerate(columns):
                    seen[row, query, key] = other // SIZE in blocks and not (choice.causal and other > place)
    return seen


def dense(query, key, value, seen) -> torch.Tensor:
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~seen[:, None], -math.inf).softmax(-1), value)


def tensors(length: int, batch: int = 2, grad: bool = False) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(length)
    sizes = (batch, length, 3, 6)
    return [torch.randn(sizes, generator=draw, dtype=torch.float64).requires_grad_(grad) for _ in range(3)]


def some_documents(kind: str, length: int) -> torch.Tensor | None:
    documents, column = torch.ones(2, length, dtype=torch.long), torch.arange(length)
    if kind == "left":
        documents[0, : length // 3] = 0
    if kind == "packed":
        documents = 1 + (column > length // 4).long() + (column > length // 2).long().expand(2, -1)
    if kind == "everywhere":  # padding between real tokens, and within packed documents
        documents = (1 + (column > length // 2).long().expand(2, -1)) * (torch.stack((column % 5, column % 3)) > 0)
    return None if kind == "none" else documents


def attend(leaves, choice, documents, kernel=fused):
    blocks = cut_into_blocks(leaves[0], documents, SIZE)
    pattern = choice.pattern(blocks, LAYER)
    output, weights = block_sparse_attention(*leaves, pattern, kernel=kernel)
    return output, weights, pattern


@torch.no_grad()
@pytest.mark.parametrize("documents", ["none", "left", "packed", "everywhere"])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_blocks_equal_the_definition(choice, documents):
    for length in LENGTHS:
        leaves, told = tensors(length), some_documents(documents, length)
        whole = torch.ones(2, length, dtype=torch.long) if told is None else told
        seen, real = visible(choice, whole), whole > 0
        expected = dense(*leaves, seen)
        found, _, _ = attend(leaves, choice, told)
        assert_close(found[real], expected[real], **CLOSE)
        assert torch.equal(found[~real], leaves[2][~real])
        if length == LENGTHS[-1]:
            found, weights, pattern = attend(leaves, choice, told, written_out)
            assert_close(found[real], expected[real], **CLOSE)
            weights = dense_block_weights(weights, pattern).transpose(1, 2)
            assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), **CLOSE)
            assert torch.equal(weights[real].amin(1) > 0, seen[real])


@pytest.mark.parametrize("kernel", [fused, written_out])
@pytest.mark.parametrize("choice", [ENCODER, DECODER], ids=str)
@pytest.mark.parametrize("documents", ["none", "everywhere"])
def test_gradients_equal_those_of_the_definition(choice, kernel, documents):
    leaves, told = tensors(61, grad=True), some_documents(documents, 61)
    whole = torch.ones(2, 61, dtype=torch.long) if told is None else told
    seen, real = visible(choice, whole), whole > 0
    expected = torch.autograd.grad(dense(*leaves, seen)[real].pow(2).sum(), leaves)
    found = torch.autograd.grad(attend(leaves, choice, told, kernel)[0][real].pow(2).sum(), leaves)
    for gradient, wanted in zip(found, expected, strict=True):
        assert_close(gradient, wanted, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_all_blocks_are_full_attention(causal):
    leaves = tensors(61)
    choice = BlockChoice(1, 0, 0, 100, causal, 0)
    full = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), is_causal=causal)
    assert_close(attend(leaves, choice, None)[0], full.transpose(1, 2), **CLOSE)


@torch.no_grad()
def test_a_block_that_is_named_twice_counts_twice():
    query, key, value = leaves = tensors(8, batch=1)
    blocks = cut_into_blocks(query, None, SIZE)
    pattern = make_pattern(blocks, [(torch.tensor([[0], [1]]), torch.tensor([[0, 1, 1], [0, 1, -1]]))])
    found, _ = block_sparse_attention(*leaves, pattern)
    twice = torch.cat((key, key[:, 4:]), dim=1), torch.cat((value, value[:, 4:]), dim=1)
    assert_close(found[:, :4], dense(query[:, :4], *twice, torch.ones(1, 4, 12).bool()), **CLOSE)
    assert_close(found[:, 4:], dense(query[:, 4:], key, value, torch.ones(1, 4, 8).bool()), **CLOSE)


def test_random_blocks_are_even_and_keep_their_rank():
    """Over the rows each earlier block is chosen about as often, and another seed or layer chooses others. In a longer
    text a block of an encoder sees those that it saw, or later ones in their place."""
    count = 400
    place = torch.arange(count)

    def chosen(choice, count, layer=LAYER):
        told = torch.full_like(place, count)[:, None]
        return choice.at_random(place[:, None], told, count, layer)

    whole = ENCODER._replace(random=3)
    found = chosen(whole, count)
    assert found.min() >= 1 and found.max() < count and ((found - place[:, None]).abs() > 1).all()
    often = torch.bincount(found.flatten(), minlength=count)
    assert often[1:].max() < 15 and often.float().var() < 4.5  # 3 of each are expected, by chance with a variance of 3
    for other in (chosen(whole._replace(seed=1), count), chosen(whole, count, LAYER + 1)):
        assert (other == found).float().mean() < 0.02
    short = chosen(whole, 200)[:200]
    for before, after in zip(short.tolist(), found[:200].tolist(), strict=True):
        assert {block for block in after if block < 200} <= set(before)


def test_operations_and_memory_are_linear_in_the_length():
    def cost(length: int) -> tuple[int, int]:
        leaves, sizes = tensors(length), []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
                return out

        with FlopCounterMode(display=False) as counter:
            attend(leaves, ENCODER, None, written_out)
        with Watch():
            attend(leaves, ENCODER, None)
        return counter.get_total_flops(), max(sizes)

    (short, small), (long, large) = cost(1024), cost(8192)
    assert 7.9 * short < long < 8.1 * short and large <= 8.1 * small
    pairs = 2 * 8192 * 3 * (7 + 4) * SIZE  # seven blocks of keys, and four of 2048 for the ends, which see all
    assert long <= 4 * 6 * pairs
