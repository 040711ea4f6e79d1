"""What a row of tokens is made of: documents one after another, and padding.

`documents` [batch, length] counts the documents of a row from 1, in order, and is 0 at padding; None where every row is
one document without padding.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn


def document_numbers(documents: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """`documents` also where every row of `like` [batch, length, ...] is one."""
    if documents is None:
        return torch.ones(like.shape[:2], dtype=torch.long, device=like.device)
    return documents


def document_runs(documents: torch.Tensor | None, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether a token is real, and the number of its document, where padding belongs to the one before it."""
    documents = document_numbers(documents, like)
    return documents > 0, documents.cummax(dim=1).values.clamp(min=1)


def document_steps(documents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether a token is real, and whether it begins a document other than the first, which may go on from a state."""
    real, document = document_runs(documents, documents)
    return real, document.diff(dim=1, prepend=torch.ones_like(document[:, :1])) != 0


def document_pieces(documents: torch.Tensor, size: int) -> Iterator[torch.Tensor | None]:
    """`documents` of each `size` tokens, for an op that starts from the state after the piece before: a document that
    goes on is number 1 again. None where a piece is nothing else."""
    before = documents.cummax(dim=1).values.clamp(min=1)
    for start in range(0, documents.shape[1], size):
        piece = documents[:, start : start + size]
        if start:
            piece = (piece - before[:, start - 1 : start] + 1) * (piece > 0)
        yield None if (piece == 1).all() else piece


def document_places(documents: torch.Tensor) -> torch.Tensor:
    """[batch, length] the place of each token among the real ones of its document, from 0."""
    place, number = (documents > 0).cumsum(1), documents.cummax(1).values
    begins = number.diff(dim=1, prepend=torch.zeros_like(number[:, :1])) > 0
    return place - (place * begins).cummax(1).values


def first_of_documents(documents: torch.Tensor, count: int) -> torch.Tensor:
    """[batch, length] whether a token is among the first `count` of its document."""
    return (documents > 0) & (document_places(documents) < count)


class Unpacked(NamedTuple):
    """Documents as rows of their own: where the real tokens of a packed batch went."""

    token: torch.Tensor  # [tokens] index of each real token in the flattened batch
    row: torch.Tensor  # [tokens] its document, counted over the batch
    place: torch.Tensor  # [tokens] its place in the document
    lengths: torch.Tensor  # [documents]
    batch_row: torch.Tensor  # [documents] the row of the batch that a document lies in

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """[documents + 1] where each document starts among the real tokens, as kernels for packed rows ask."""
        return nn.functional.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)

    @property
    def first(self) -> torch.Tensor:
        """[documents] whether a document is the first of its batch row."""
        return self.batch_row.diff(prepend=self.batch_row.new_full((1,), -1)) != 0

    @property
    def last(self) -> torch.Tensor:
        return self.batch_row.diff(append=self.batch_row.new_full((1,), -1)) != 0

    @property
    def real(self) -> torch.Tensor:
        """[documents, longest] whether a place of `unpack` holds a token."""
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths[:, None]

    @property
    def longest(self) -> int:
        return int(self.lengths.max()) if len(self.lengths) else 0

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[batch, length, ...] -> [documents, longest, ...], left-aligned, zero past the end of a document."""
        rows = packed.new_zeros(len(self.lengths), self.longest, *packed.shape[2:])
        return rows.index_put((self.row, self.place), packed.flatten(0, 1).index_select(0, self.token))

    def repack(self, rows: torch.Tensor, batch: int, length: int) -> torch.Tensor:
        """[documents, longest, ...] -> [batch, length, ...], zero at padding. The inverse of `unpack`."""
        return self.repack_into(rows.new_zeros(batch, length, *rows.shape[2:]), rows)

    def repack_into(self, packed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`packed` [batch, length, ...] with the tokens of `rows` in their places, and what it held elsewhere."""
        tokens = packed.flatten(0, 1).index_put((self.token,), rows[self.row, self.place])
        return tokens.unflatten(0, packed.shape[:2])


class EvenlyUnpacked(NamedTuple):
    """The same where rows are whole: every `stride`-th token of a row of `length`, in groups of `size`. Tokens that lie
    side by side stay where they are."""

    stride: int
    size: int
    batch: int
    length: int
    device: torch.device

    @property
    def tokens(self) -> int:
        """How many are taken of a row."""
        return -(-self.length // self.stride)

    @property
    def longest(self) -> int:
        return self.size

    @property
    def real(self) -> torch.Tensor | None:
        """[groups, size] whether a place of `unpack` holds a token; None where all do."""
        if self.tokens % self.size == 0:
            return None
        places = torch.arange(-(-self.tokens // self.size) * self.size, device=self.device)
        return (places < self.tokens).unflatten(0, (-1, self.size)).repeat(self.batch, 1)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[batch, length, ...] -> [groups, size, ...], zero past the end of a row."""
        taken, missing = packed[:, :: self.stride], -self.tokens % self.size
        if missing:
            taken = nn.functional.pad(taken, (0, 0) * (packed.ndim - 2) + (0, missing))
        return taken.reshape(-1, self.size, *packed.shape[2:])

    def repack_into(self, packed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        taken = rows.unflatten(0, (self.batch, -1)).flatten(1, 2)[:, : self.tokens]
        return taken if self.stride == 1 else torch.slice_scatter(packed, taken, dim=1, step=self.stride)


def left_aligned(token: torch.Tensor, starts: torch.Tensor, length: int) -> Unpacked:
    """The tokens with the indices `token` [tokens], in order, as rows that begin where `starts` [tokens] says; `length`
    is that of a row of the packed batch."""
    row = starts.cumsum(0) - 1
    first = starts.nonzero().squeeze(-1)
    place = torch.arange(len(token), device=token.device) - first[row]
    return Unpacked(token, row, place, torch.bincount(row, minlength=len(first)), token[first] // length)


def document_starts(documents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[tokens] the index of each real token in the flattened batch, and whether a document starts there."""
    token = documents.flatten().nonzero().squeeze(-1)
    starts = torch.ones_like(token, dtype=torch.bool)
    starts[1:] = (documents.flatten()[token].diff() != 0) | ((token // documents.shape[1]).diff() != 0)
    return token, starts


def find_documents(documents: torch.Tensor) -> Unpacked:
    """The tool for what cannot cut a state inside (FFT convolutions) and for grids over positions (segments, patches):
    unpack, run on left-aligned rows, repack."""
    return left_aligned(*document_starts(documents), documents.shape[1])
