"""Attention whose scores get a bias by the distance of key and query, without a tensor of all pairs.

Such a bias is constant along diagonals. If queries are counted from the last to the first, the bias of all pairs is a
view of a table with one number per distance and head: row i of it begins at number i. No pair is written down, and
torch's fused attention reads the view as it is.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

BIAS_ROOM = 2**23  # numbers of a bias that are written down at once, where it must be: 32 MiB in float32
QUERY_BLOCK = 1024  # queries that see the same keys, of which the last alone needs all: fewer work less, but less well

AttentionKernel = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
BiasedPieces = Iterator[tuple[slice, slice, torch.Tensor]]


def biased_attention(
    bias,
    kernel: AttentionKernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    key_positions: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """kernel(query, key, value, mask) with `bias` in the mask, a block of queries at a time.

    query [batch, heads, queries, dim], key and value [batch, heads, keys, dim]; ([batch, queries, heads, dim], weights
    or None). `bias.of_distance(distance [..., queries, keys])` answers [..., heads, queries, keys], and `bias.causal`
    says what is hidden where there is no mask. `key_positions` [batch or 1, keys] and `bias.query_positions` say where
    all stand; without the former, the last keys are those of the queries, and all stand where their columns say.
    """
    straight = key_positions is None
    if straight:
        pieces, query = diagonal_pieces(bias, query, key, attention_mask), query.flip(2)
    else:
        pieces = written_pieces(bias, query, key, attention_mask, key_positions)
    answers = [kernel(query[:, :, rows], key[:, :, seen], value[:, :, seen], mask) for rows, seen, mask in pieces]
    outputs, weights = zip(*answers, strict=True)
    output, weights = torch.cat(outputs, dim=1), rows_of_all(weights, key.shape[2])
    if straight:
        output, weights = output.flip(1), None if weights is None else weights.flip(2)
    return output, weights


def rows_of_all(weights: tuple[torch.Tensor | None, ...], keys: int) -> torch.Tensor | None:
    """The weights of blocks as those of one call, 0 for keys that a block was not shown."""
    if weights[0] is None:
        return None
    return torch.cat([F.pad(block, (0, keys - block.shape[-1])) for block in weights], dim=2)


def diagonal_pieces(bias, query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None) -> BiasedPieces:
    """Blocks of queries, the last query first."""
    queries, keys = query.shape[2], key.shape[2]
    distance = torch.arange(1 - keys, queries, device=query.device)
    table = bias.of_distance(distance[None, None])[0, :, 0].to(query.dtype)  # [heads, distances]
    table = table.contiguous()  # torch's fused attention copies all pairs where neighbours are not side by side
    if attention_mask is None and bias.causal:
        table = table.masked_fill(distance > 0, torch.finfo(table.dtype).min)
    if attention_mask is not None or table.requires_grad:
        block = max(1, BIAS_ROOM // (query.shape[0] * query.shape[1] * keys))
    else:
        block = QUERY_BLOCK if bias.causal else queries
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        shown_keys = keys - start if attention_mask is None and bias.causal else keys
        rows, seen = slice(start, stop), slice(0, shown_keys)
        # A view of what the block needs alone: backward fills as much as the view was taken of
        mask = table[:, start : stop + shown_keys - 1].unfold(-1, shown_keys, 1)[None]
        if attention_mask is not None:
            shown = attention_mask[:, :, max(0, queries - start - block) : queries - start].flip(2)
            mask = biased_mask(mask, shown)
        yield rows, seen, mask


def written_pieces(bias, query, key, attention_mask, key_positions: torch.Tensor) -> BiasedPieces:
    """Blocks of queries, whose biases are looked up pair by pair."""
    queries, keys = query.shape[2], key.shape[2]
    if torch.compiler.is_exporting():  # the program would hold the number of several blocks for one length
        blocks = [slice(None)]
    else:
        block = max(1, BIAS_ROOM // (query.shape[0] * query.shape[1] * keys))
        blocks = [slice(start, start + block) for start in range(0, queries, block)]
    for rows in blocks:
        distance = key_positions[:, None, :] - bias.query_positions[:, rows, None]
        mask = bias.of_distance(distance).to(query.dtype)
        if attention_mask is not None:
            mask = biased_mask(mask, attention_mask[:, :, rows])
        elif bias.causal:  # the skip that transformers' masks allow: plainly causal, or nothing hidden
            mask = mask.masked_fill(distance[:, None] > 0, torch.finfo(mask.dtype).min)
        yield rows, slice(None), mask


def biased_mask(mask: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    """A bias and a mask of what is shown (bool), or one that is added."""
    if shown.dtype == torch.bool:
        return torch.where(shown, mask, torch.finfo(mask.dtype).min)
    return mask + shown
