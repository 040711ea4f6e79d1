"""Attention of blocks of queries to a few blocks of keys each (BigBird, arXiv:2007.14062, appendix D).

Texts are cut into blocks of real tokens, each from its own first token: nothing rests on padding or packing. A pattern
names, for each block of queries, the blocks of keys that it sees: these are gathered, block by block, beside one
another. Cost and memory are linear in the number of pairs of blocks that see each other.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from transformers.utils.import_utils import is_tracing

from .attention_kernels import Kernel, fused
from .documents import EvenlyUnpacked, Unpacked, document_numbers, left_aligned

# Numbers of gathered keys at once: few stay in a CPU's cache. Where autograd goes back through what is gathered, each
# piece would cost it a pass over the gradient of all keys
IN_CACHE, AT_ONCE = 2**20, 2**26
NO_BLOCK = -1  # in the place of the index of a block
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Blocks(NamedTuple):
    """Texts cut into blocks: all blocks of a batch in a row, those of a text side by side, in order."""

    cut: Unpacked | EvenlyUnpacked
    shape: torch.Size  # [batch, length]
    place: torch.Tensor  # [blocks] where a block stands in its text; below 0, a block of tokens ahead of it
    first: torch.Tensor  # [blocks] the index of the first block of its text
    count: torch.Tensor  # [blocks] how many blocks its text has
    longest: int  # blocks of the longest text
    ahead: int  # blocks of tokens ahead of each text

    @property
    def size(self) -> int:
        return self.cut.size if isinstance(self.cut, EvenlyUnpacked) else self.cut.longest

    def ends(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The indices of the blocks ahead of their text and of its `first` and `last` ones, [rows, several] where those
        of a text are side by side, and of all others [rows]."""
        if isinstance(self.cut, EvenlyUnpacked):
            index = torch.arange(len(self.place), device=self.place.device).view(-1, self.longest)
            end = max(first, self.longest - last)
            return torch.cat((index[:, :first], index[:, end:]), dim=1), index[:, first:end].flatten()
        at_end = (self.place < first) | (self.place >= self.count - last)
        return at_end.nonzero(), (~at_end).nonzero().squeeze(-1)

    def of_text(self, block: torch.Tensor) -> torch.Tensor:
        """[rows, most blocks] the indices of all blocks of the texts that the blocks [rows] are of."""
        place = torch.arange(-self.ahead, self.longest, device=block.device)
        return torch.where(place < self.count[block, None], self.first[block, None] + place, NO_BLOCK)


def cut_into_blocks(tokens: torch.Tensor, documents: torch.Tensor | None, size: int, ahead: int = 0) -> Blocks:
    """The blocks of `size` tokens of a batch `tokens` [batch, length, ...]; documents [batch, length] as in
    `documents.py`. The first `ahead` columns are tokens ahead of the texts, as many of each document, in blocks of
    their own."""
    batch, length = tokens.shape[:2]
    if documents is None and ahead == 0:
        count = -(-length // size)
        index = torch.arange(batch * count, device=tokens.device)
        cut = EvenlyUnpacked(1, min(size, length), batch, length, tokens.device)
        return Blocks(
            cut, tokens.shape[:2], index % count, index - index % count, torch.full_like(index, count), count, 0
        )
    documents = document_numbers(documents, tokens)
    token = documents.flatten().nonzero().squeeze(-1)
    text = (token // length) * (length + 1) + documents.flatten()[token]
    text, order = text.sort(stable=True)  # those ahead of a text come right before it
    token = token[order]
    is_ahead = token % length < ahead
    changes = torch.ones_like(is_ahead)
    changes[1:] = (text.diff() != 0) | (is_ahead.diff() != 0)
    begins = left_aligned(token, changes, length).place % size == 0
    return number_blocks(left_aligned(token, begins, length), tokens.shape[:2], text[begins], is_ahead[begins])


def number_blocks(cut: Unpacked, shape: torch.Size, text: torch.Tensor, is_ahead: torch.Tensor) -> Blocks:
    """text [blocks] tells those of one text, side by side, from others."""
    _, text, total = text.unique_consecutive(return_inverse=True, return_counts=True)
    ahead = torch.zeros_like(total).index_add_(0, text, is_ahead.long())
    first = (total.cumsum(0) - total + ahead)[text]
    place = torch.arange(len(text), device=text.device) - first
    longest, most = (int(x.max()) if len(x) else 0 for x in (total - ahead, ahead))
    return Blocks(cut, shape, place, first, (total - ahead)[text], longest, most)


class BlockGroup(NamedTuple):
    """Blocks of queries that see as many blocks of keys."""

    queries: torch.Tensor  # [rows, several] which see the same
    keys: torch.Tensor  # [rows, count]; a block that comes twice counts twice
    hidden: torch.Tensor  # [rows, count, size] the keys that are none

    def pieces(self, blocks: int) -> Iterator["BlockGroup"]:
        """As many rows at once as gather so many blocks of keys, or one."""
        rows = max(1, blocks // max(1, self.keys.shape[1]))
        return (BlockGroup(*parts) for parts in zip(*(x.split(rows) for x in self), strict=True))

    def gather(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
        """Blocks [blocks, size, heads, dim] -> [rows, heads, several * size or count * size, dim] of each."""
        return [
            x.index_select(0, index.flatten()).unflatten(0, index.shape).flatten(1, 2).transpose(1, 2)
            for x, index in ((query, self.queries), (key, self.keys), (value, self.keys))
        ]

    def mask(self, like: torch.Tensor, causal: bool) -> torch.Tensor:
        """[rows, 1, several * size, count * size], added to the scores; made when it is needed, since it is large."""
        (several, size), hidden = (self.queries.shape[1], self.hidden.shape[-1]), self.hidden[:, None, None]
        if causal:
            slot = torch.arange(size, device=like.device)
            own = self.queries[:, :, None] == self.keys[:, None]
            hidden = hidden | (own[:, :, None, :, None] & (slot > slot[:, None, None]))
        hidden = hidden.flatten(3).flatten(1, 2)[:, None]
        mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -math.inf)
        return mask.expand(-1, -1, several * size, -1)


class BlockPattern(NamedTuple):
    """Who sees whom in a batch: made once by `make_pattern` for all layers that see the same."""

    blocks: Blocks
    groups: tuple[BlockGroup, ...]
    where: torch.Tensor  # [blocks] the place of each block among the queries of all groups
    causal: bool  # within a block, a token sees none after it


def make_pattern(
    blocks: Blocks, groups: Sequence[tuple[torch.Tensor, torch.Tensor]], causal: bool = False
) -> BlockPattern:
    """groups: (queries [rows, several], keys [rows, count]), the indices of blocks, NO_BLOCK where keys are fewer;
    queries of no group get no answer that means anything."""
    made = []
    for queries, keys in groups:
        if queries.numel():
            hidden = (keys == NO_BLOCK)[..., None].expand(-1, -1, blocks.size)
            keys, real = keys.clamp(min=0), blocks.cut.real
            made.append(BlockGroup(queries, keys, hidden if real is None else hidden | ~real[keys]))
    asked = torch.cat([group.queries.flatten() for group in made]) if made else blocks.place
    where = torch.zeros_like(blocks.place).index_put((asked,), torch.arange(len(asked), device=asked.device))
    return BlockPattern(blocks, tuple(made), where, causal)


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: BlockPattern,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    kernel: Kernel = fused,
) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """softmax(q k^T scale) v over what the pattern shows; padding answers with its own value.

    query, key, value [batch, length, heads, dim]. Answers ([batch, length, heads, dim], weights of groups or None):
    `dense_block_weights` brings those into the usual form.
    """
    cut, outputs, weights = pattern.blocks.cut, [], []
    blocks = [cut.unpack(x) for x in (query, key, value)]
    again = torch.is_grad_enabled() and can_gather_again(query, kernel, dropout)
    for group in pattern.groups:
        if again:
            outputs.append(GatheredAttention.apply(*blocks, group, pattern.causal, scale))
            continue
        output, seen = attend_in_pieces(*blocks, group, pattern.causal, kernel, scale=scale, dropout=dropout)
        outputs.append(output)
        weights.append(seen)
    output = torch.cat(outputs).index_select(0, pattern.where) if outputs else blocks[0]
    return cut.repack_into(value, output).contiguous(), None if kernel is fused else weights


def attend_in_pieces(query, key, value, group: BlockGroup, causal: bool, kernel: Kernel, **options):
    """What a group answers [rows * several, size, heads, dim], and its weights [rows, heads, several * size, keys]."""
    outputs, weights = [], []
    for piece in group.pieces((AT_ONCE if torch.is_grad_enabled() else IN_CACHE) // key[0].numel()):
        output, seen = kernel(*piece.gather(query, key, value), piece.mask(query, causal), **options)
        outputs.append(into_blocks(output, query.shape[1]))
        weights.append(seen)
    return torch.cat(outputs), None if weights[0] is None else torch.cat(weights)


def into_blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """[rows, heads, count * size, dim] -> [rows * count, size, heads, dim]."""
    return x.transpose(1, 2).unflatten(1, (-1, size)).flatten(0, 1)


def can_gather_again(query: torch.Tensor, kernel: Kernel, dropout: float) -> bool:
    return query.device.type == "cpu" and kernel is fused and dropout == 0 and not is_tracing(query)


class GatheredAttention(torch.autograd.Function):
    """The answers of a group by torch's fused attention on a CPU, whose backward pass gathers again, a piece at a time:
    nothing that was gathered is kept, or has a gradient of its own."""

    @staticmethod
    def forward(ctx, query, key, value, group: BlockGroup, causal: bool, scale: float | None):
        ctx.group, ctx.options = group, (causal, scale)
        outputs, sums = [], []
        for piece in group.pieces(IN_CACHE // key[0].numel()):
            told = {"attn_mask": piece.mask(query, causal), "scale": scale}
            output, total = FLASH(*piece.gather(query, key, value), 0.0, False, **told)
            outputs.append(into_blocks(output, query.shape[1]))
            sums.append(total)
        answers = torch.cat(outputs)
        ctx.save_for_backward(query, key, value, answers, torch.cat(sums))
        return answers

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (*blocks, answers, sums), (causal, scale) = ctx.saved_tensors, ctx.options
        grads, size, seen = [torch.zeros_like(x) for x in blocks], answers.shape[1], 0
        for piece in ctx.group.pieces(IN_CACHE // blocks[1][0].numel()):
            (rows, several), told = piece.queries.shape, {"attn_mask": piece.mask(blocks[0], causal), "scale": scale}
            here = slice(seen * several, (seen + rows) * several)
            back, output = (x[here].unflatten(0, (rows, -1)).flatten(1, 2).transpose(1, 2) for x in (grad, answers))
            found = FLASH_BACKWARD(back, *piece.gather(*blocks), output, sums[seen : seen + rows], 0.0, False, **told)
            for total, index, x in zip(grads, (piece.queries, piece.keys, piece.keys), found, strict=True):
                total.index_add_(0, index.flatten(), into_blocks(x, size))
            seen += rows
        return *grads, None, None, None


def dense_block_weights(weights: Sequence[torch.Tensor], pattern: BlockPattern) -> torch.Tensor:
    """Weights of groups as [batch, heads, length, length]: as large as those of full attention. Padding sees itself."""
    cut, (batch, length) = pattern.blocks.cut, pattern.blocks.shape
    column = cut.unpack(torch.arange(length, device=pattern.where.device).expand(batch, -1))
    rows = []
    for group, of_group in zip(pattern.groups, weights, strict=True):
        index = column[group.keys].flatten(1)[:, None, None].expand_as(of_group)
        dense = of_group.new_zeros(*of_group.shape[:3], length).scatter_add(3, index, of_group)
        rows.append(dense.transpose(1, 2).unflatten(1, (group.queries.shape[1], -1)).flatten(0, 1))
    own = torch.eye(length, device=column.device, dtype=rows[0].dtype)[None, :, None]
    own = own.expand(batch, -1, rows[0].shape[2], -1)
    return cut.repack_into(own, torch.cat(rows)[pattern.where]).transpose(1, 2)
