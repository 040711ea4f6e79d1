"""Attention among tokens that are sorted by bucket (Reformer, Kitaev et al., 2020, arXiv:2001.04451, section 2).

The tokens of a document are sorted by bucket and arrival, and cut into blocks: a token sees its own block and the one
before, whatever their buckets, the first block of a round the last one of the round before, as in the authors' code.
Causal or not, later tokens move the borders of the blocks: it sees the whole document, and nothing can be kept of one.
`bucketed_attention.py` has the form whose past stays as it was.

Shapes as there.
"""

import torch
import torch.nn.functional as F

from .arrangement import HIDDEN, ITSELF, arrangement_by, join_rounds, weigh_scores, weights_of
from .bucketed_attention import document_and_bucket
from .documents import Unpacked, find_documents


def sorted_attention(
    query, key, value, buckets, *, num_buckets, block, causal, sees_itself=True, dropout=0.0, documents=None
) -> torch.Tensor:
    """[batch, length, heads, value_dim]."""
    if documents is None:
        return attend_to_neighbours(query, key, value, buckets, None, num_buckets, block, causal, sees_itself, dropout)
    found = find_documents(documents)
    rows = (found.unpack(x) for x in (query, key, value, buckets))
    output = attend_to_neighbours(*rows, found, num_buckets, block, causal, sees_itself, dropout)
    return found.repack(output, *documents.shape)


def attend_to_neighbours(
    query, key, value, buckets, found: Unpacked | None, num_buckets, block, causal, sees_itself, dropout
) -> torch.Tensor:
    """The same where each row is a document, with places of `found` that hold no token past its end."""
    (batch, length, heads), rounds = query.shape[:3], buckets.shape[3]
    numbers = buckets.permute(0, 2, 3, 1)
    if found is not None:
        numbers = numbers.masked_fill(~found.real[:, None, None], num_buckets)
    numbers, column = numbers.sort(dim=-1, stable=True)
    chunks = -(-length // block)
    sorted_ = arrangement_by(column, heads, chunks * block)
    query, key, value = (sorted_.arrange(x).view(batch, heads, rounds * chunks, block, -1) for x in (query, key, value))
    before = block_before(rounds, chunks, block, found, column)
    key, value = (torch.cat((take_blocks(x, before), x), dim=3) for x in (key, value))
    column = F.pad(column.masked_fill(numbers == num_buckets, length), (0, chunks * block - length), value=length)
    column = column.view(batch, -1, rounds * chunks, block, 1)
    columns = torch.cat((take_blocks(column, before), column), dim=3).transpose(3, 4)
    scores = query @ key.transpose(3, 4)
    hidden = columns > column if causal else columns == length
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(hidden, HIDDEN)
    if not sees_itself:
        scores = scores.masked_fill(columns == column, ITSELF)
    weights, normalizer = weigh_scores(scores, rounds > 1)
    output = F.dropout(weights, dropout).to(value.dtype) @ value
    if normalizer is not None:
        normalizer = sorted_.restore(normalizer.flatten(0, 3))
    return join_rounds(sorted_.restore(output.flatten(0, 3)), normalizer)


def block_before(rounds: int, chunks: int, block: int, found: Unpacked | None, like: torch.Tensor) -> torch.Tensor:
    """[batch, rounds * chunks] the block that each looks back to."""
    number = torch.arange(chunks, device=like.device)
    last = number[-1:, None] if found is None else (found.lengths[:, None] - 1) // block
    turn = torch.arange(rounds, device=like.device)[:, None]
    first = (turn - 1) % rounds * chunks + last[:, None]
    return torch.where(number > 0, turn * chunks + number - 1, first).flatten(1).expand(like.shape[0], -1)


def take_blocks(x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """x [batch, heads, blocks, block, dim] at the blocks [batch, blocks]."""
    return x.gather(2, number[:, None, :, None, None].expand_as(x))


def sorted_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    buckets: torch.Tensor,
    *,
    num_buckets: int,
    block: int,
    causal: bool,
    sees_itself: bool,
    documents: torch.Tensor | None,
) -> torch.Tensor:
    """The definition: the weights of all pairs, [batch, heads, length, length]."""
    numbers, _ = document_and_bucket(buckets, documents, num_buckets)
    document = (numbers // num_buckets)[:, :1, :1]
    same = document[..., :, None] == document[..., None, :]
    before = (numbers[..., None, :] < numbers[..., :, None]) & same  # sorted to a place before it
    column = torch.arange(query.shape[1], device=query.device)
    before = before | ((numbers[..., None, :] == numbers[..., :, None]) & (column < column[:, None]))
    at = before.sum(-1) // block
    last = (same.sum(-1) - 1) // block
    own, others = at[..., :, None], at[..., None, :]
    of_last_round = (at.roll(1, dims=2) == last)[..., None, :]
    seen = (own == others).long() + ((own - 1 == others) | ((own == 0) & of_last_round))
    seen = (seen * same).sum(2)
    return weights_of(query, key, seen.tril() if causal else seen, sees_itself)
