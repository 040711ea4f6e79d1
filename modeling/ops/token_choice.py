"""Which tokens of a text something works on, and these tokens as rows of their own.

A share of a text is ceil(capacity * its real tokens), those that score highest; of equal scores the first. It depends
on the whole text: what is chosen of the past changes with the future.
"""

import math
from typing import NamedTuple

import torch

from .documents import document_places, left_aligned

ROUNDING = 1e-9  # 0.1 * 30 is more than 3 in floating point


def share_of_length(length: int, capacity: float) -> int:
    return math.ceil(capacity * length - ROUNDING)


def top_share(scores: torch.Tensor, capacity: float, documents: torch.Tensor | None = None) -> torch.Tensor:
    """scores [batch, length], documents [batch, length] as in `ops/documents.py` -> [batch, length], whether a token is
    of the share `capacity` of its document that scores highest."""
    order = scores.detach().argsort(dim=1, descending=True, stable=True)
    if documents is None:
        kept = order[:, : share_of_length(scores.shape[1], capacity)]
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, kept, True)
    order = order.gather(1, documents.gather(1, order).argsort(dim=1, stable=True))  # by document, then by score
    number = documents.gather(1, order)
    lengths = torch.zeros_like(number).scatter_add(1, documents, torch.ones_like(number))
    share = (lengths.double() * capacity - ROUNDING).ceil().gather(1, number)
    kept = (document_places(number) < share) & (number > 0)
    return torch.zeros_like(kept).scatter(1, order, kept)


class ChosenRows(NamedTuple):
    """Tokens of a batch [batch, length, ...] as left-aligned rows, one for each document that has any."""

    index: torch.Tensor  # [rows, longest] of each place, the token's in the flattened batch
    real: torch.Tensor | None  # [rows, longest] whether a place holds a token; None where all do
    batch_row: torch.Tensor  # [rows] the row of the batch that each is of
    last: torch.Tensor | None  # [rows] whether it is the last of its row of the batch; None where all are
    batch: int
    length: int

    @property
    def nothing(self) -> bool:
        return self.real is not None and self.index.numel() == 1 and not bool(self.real)

    @property
    def counts(self) -> torch.Tensor:
        """[rows] how many tokens each holds."""
        rows, longest = self.index.shape
        return self.index.new_full((rows,), longest) if self.real is None else self.real.sum(1)

    @property
    def whole(self) -> bool:
        """Whether the rows are those of the batch, token by token."""
        return self.real is None and self.index.shape == (self.batch, self.length)

    def take(self, batch: torch.Tensor) -> torch.Tensor:
        """[batch or 1, length, ...] -> [rows, longest, ...]; past the end of a row, any token."""
        if self.whole:
            return batch
        index = self.index if len(batch) == self.batch else self.index % self.length
        return batch.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, self.index.shape)

    def put(self, batch: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`batch` with the tokens of `rows` in their places, and what it held elsewhere."""
        if self.whole:
            return rows
        token, rows = (self.index, rows) if self.real is None else (self.index[self.real], rows[self.real])
        tokens = rows if self.real is not None else rows.flatten(0, 1)
        return batch.flatten(0, 1).index_copy(0, token.flatten(), tokens).view_as(batch)


def rows_of_share(chosen: torch.Tensor, share: int) -> ChosenRows:
    """As `rows_of`, where each row of the batch is one text of which `share` tokens are chosen: no shape rests on
    values, so that it can be compiled."""
    batch, length = chosen.shape
    place = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :share]
    row = torch.arange(batch, device=chosen.device)
    return ChosenRows(place + length * row[:, None], None, row, None, batch, length)


def all_rows(chosen: torch.Tensor, most: int) -> ChosenRows:
    """As `rows_of`, a row for each of the batch, whatever is chosen of it, with `most` places: no shape rests on
    values."""
    rows = rows_of_share(chosen, most)
    return rows._replace(real=chosen.flatten()[rows.index.flatten()].view_as(rows.index))


def rows_of(chosen: torch.Tensor, documents: torch.Tensor | None = None) -> ChosenRows:
    """The tokens that are True in `chosen` [batch, length], as rows. If there are none, a row without a token."""
    batch, length = chosen.shape
    token = chosen.flatten().nonzero().squeeze(-1)
    if not len(token):
        nowhere = token.new_zeros(1)
        return ChosenRows(
            nowhere[None], torch.zeros_like(nowhere[None], dtype=torch.bool), nowhere, None, batch, length
        )
    starts = torch.ones_like(token, dtype=torch.bool)
    starts[1:] = (token // length).diff() != 0
    if documents is not None:
        starts[1:] |= documents.flatten()[token].diff() != 0
    found = left_aligned(token, starts, length)
    real = None if found.longest * len(found.lengths) == len(token) else found.real
    index = token.new_zeros(len(found.lengths), found.longest).index_put((found.row, found.place), token)
    last = None if len(found.batch_row) == batch and documents is None else found.last
    return ChosenRows(index, real, found.batch_row, last, batch, length)
