"""What a row of tokens is made of: documents one after another, and padding.

`documents` [batch, length] counts the documents of a row from 1, in order, and is 0 at padding; None where every row is
one document without padding.
"""

from typing import NamedTuple

import torch


def document_runs(documents: torch.Tensor | None, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether a token is real, and the number of its document, where padding belongs to the one before it."""
    if documents is None:
        documents = torch.ones(like.shape[:2], dtype=torch.long, device=like.device)
    return documents > 0, documents.cummax(dim=1).values.clamp(min=1)


def drop_padding(hidden_states: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
    """Zero the padded positions of [batch, length, size], so that they add nothing to a recurrent state."""
    return hidden_states if documents is None else hidden_states * (documents > 0)[..., None]


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
        return torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)

    @property
    def first(self) -> torch.Tensor:
        """[documents] whether a document is the first of its batch row."""
        return self.batch_row.diff(prepend=self.batch_row.new_full((1,), -1)) != 0

    @property
    def last(self) -> torch.Tensor:
        return self.batch_row.diff(append=self.batch_row.new_full((1,), -1)) != 0

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """[batch, length, ...] -> [documents, longest, ...], left-aligned, zero past the end of a document."""
        longest = int(self.lengths.max()) if len(self.lengths) else 0
        rows = packed.new_zeros(len(self.lengths), longest, *packed.shape[2:])
        return rows.index_put((self.row, self.place), packed.flatten(0, 1)[self.token])

    def repack(self, rows: torch.Tensor, batch: int, length: int) -> torch.Tensor:
        """[documents, longest, ...] -> [batch, length, ...], zero at padding. The inverse of `unpack`."""
        packed = rows.new_zeros(batch * length, *rows.shape[2:])
        return packed.index_put((self.token,), rows[self.row, self.place]).unflatten(0, (batch, length))


def find_documents(documents: torch.Tensor) -> Unpacked:
    """The tool for what cannot cut a state inside (FFT convolutions) and for grids over positions (segments, patches):
    unpack, run on left-aligned rows, repack."""
    token = documents.flatten().nonzero().squeeze(-1)
    batch_row = token // documents.shape[1]
    number = documents.flatten()[token]
    starts = torch.ones_like(token, dtype=torch.bool)
    starts[1:] = (number.diff() != 0) | (batch_row.diff() != 0)
    row = starts.cumsum(0) - 1
    first_token = starts.nonzero().squeeze(-1)
    place = torch.arange(len(token), device=token.device) - first_token[row]
    lengths = torch.bincount(row, minlength=len(first_token))
    return Unpacked(token, row, place, lengths, batch_row[first_token])
