"""Softmax attention in parts: the keys of a query in several groups, each of which is compared in a shape of its own.

    out_i = sum over parts of e^(top_part - top) numerator_part  /  the same of denominator_part

with numerator = sum_j e^(s_ij - top_part) v_j, denominator = sum_j e^(s_ij - top_part) and top the largest score: what
one softmax over all keys gives. A key that is in two parts counts twice.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

SCORES_AT_ONCE = 2**20  # scores that are written down at once: 4 MiB in float32
QUERIES_AT_ONCE = 256  # that see the same keys, of which the last alone needs all


class Partial(NamedTuple):
    """The softmax over some of the keys, before it is divided."""

    numerator: torch.Tensor  # [..., dim]
    denominator: torch.Tensor  # [..., 1]
    top: torch.Tensor  # [..., 1], a number alone: no gradient goes through it

    def each(self, change) -> "Partial":
        """With `change` applied to all three."""
        return Partial(*(change(x) for x in self))


def partial_attention(query, key, value, hidden: torch.Tensor | None, scale: float, dropout: float = 0.0) -> Partial:
    """query [rows, queries, dim], key and value [rows, keys, dim]; hidden [queries, keys], the pairs that are not
    compared, of which no query has all. A few rows at once."""
    count = max(1, SCORES_AT_ONCE // (query.shape[1] * key.shape[1]))
    pieces = zip(*(x.split(count) for x in (query * scale, key, value)), strict=True)
    return joined_partials([attend_piece(*piece, hidden, dropout) for piece in pieces], 0)


def attend_piece(query, key, value, hidden: torch.Tensor | None, dropout: float) -> Partial:
    scores = query @ key.transpose(1, 2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if hidden is not None:
        scores = scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
    top = scores.detach().amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    denominator = weights.sum(-1, keepdim=True)
    return Partial(F.dropout(weights, dropout, dropout > 0).to(value.dtype) @ value, denominator, top)


def causal_partial(query, key, value, scale: float, dropout: float = 0.0) -> Partial:
    """The same of queries that see the keys at their own places and before."""
    pieces = []
    for start in range(0, query.shape[1], QUERIES_AT_ONCE):
        asked = query[:, start : start + QUERIES_AT_ONCE]
        end = start + asked.shape[1]
        hidden = torch.ones(asked.shape[1], end, dtype=torch.bool, device=query.device).triu(start + 1)
        pieces.append(partial_attention(asked, key[:, :end], value[:, :end], hidden, scale, dropout))
    return joined_partials(pieces, 1)


def joined_partials(pieces: list[Partial], dim: int) -> Partial:
    return pieces[0] if len(pieces) == 1 else Partial(*(torch.cat(parts, dim) for parts in zip(*pieces, strict=True)))


def together(parts: list[Partial]) -> torch.Tensor:
    """The softmax over the keys of all parts, [..., dim]."""
    top = torch.stack([part.top for part in parts]).amax(0)
    weights = [(part.top - top).exp() for part in parts]
    numerator = sum(weight * part.numerator for weight, part in zip(weights, parts, strict=True))
    denominator = sum(weight * part.denominator for weight, part in zip(weights, parts, strict=True))
    return (numerator / denominator).to(parts[0].numerator.dtype)
