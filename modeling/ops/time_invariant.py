"""Linear recurrences that are the same at every step, a chunk of tokens at a time.

    state_t = A state_(t-1) + B x_t          y_t = C state_t + D x_t          for each channel by itself

What such a recurrence does to a chunk are a few matrices, made once: inside a chunk a Toeplitz matrix of C A^k B, into
the state A^k B, out of it C A^k. A text is then matrix products, and a recurrence over its chunks: linear in the
length, where an FFT is not, exact for states that go on, and on most machines faster. A document begins with a chunk of
its own, so that no matrix has to be cut.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from .documents import find_documents
from .precision import without_autocast

CHUNK = 64  # tokens: fewer do not fill a matrix product, more are more work


class Chunks(Protocol):
    """The matrices of a recurrence for chunks of `size` tokens; `numbers` make up a state."""

    numbers: int
    within: torch.Tensor  # [channels, size, size] from a token (the first size) to another
    out_of: torch.Tensor  # [channels, directions * numbers, size] from the state at the start to a token

    def take_in(self, rows: torch.Tensor) -> torch.Tensor:
        """What tokens [channels, rows, size] add to the state at the end, [channels, rows, directions * numbers]."""

    def carry(self, added: torch.Tensor, keep: torch.Tensor | None, state: torch.Tensor | None) -> torch.Tensor:
        """The states at the starts of chunks from what each chunk adds, [channels, chunks, batch, numbers] both, and
        the state before the first [channels, batch, numbers]. `keep` [chunks, batch]: whether a state outlives it."""

    def advance(self, state: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """The state [channels, batch, numbers] after `count` [batch] steps without an input, at most a chunk."""


class Aligned(NamedTuple):
    """Where the tokens of documents are when each document begins a chunk, [batch, chunks * size] in all."""

    token: torch.Tensor  # [tokens] index of each real token in the flattened batch
    place: torch.Tensor  # [tokens] its index among the flattened chunks
    keep: torch.Tensor  # [batch, chunks] whether a chunk goes on with the state before it
    last: torch.Tensor  # [batch] the chunk of the last real token
    count: torch.Tensor  # [batch] the tokens in it


def aligned(documents: torch.Tensor, size: int) -> Aligned:
    """`documents` [batch, length]: see `documents.py`."""
    found, batch = find_documents(documents), documents.shape[0]
    taken = -(-found.lengths // size)
    starts = taken.cumsum(0) - taken
    rows = torch.zeros(batch, dtype=torch.long, device=documents.device).index_add(0, found.batch_row, taken)
    starts = starts - (rows.cumsum(0) - rows)[found.batch_row]  # the first chunk of each document in its row
    chunks = max(int(rows.max()), 1)
    place = (found.batch_row * chunks + starts)[found.row] * size + found.place
    first_number = documents.flatten()[found.token[found.place == 0]]
    keep = torch.ones(batch, chunks, dtype=torch.bool, device=documents.device)
    keep = keep.index_put((found.batch_row, starts), first_number == 1)
    count = torch.zeros_like(rows).index_put((found.batch_row[found.last],), (found.lengths[found.last] - 1) % size + 1)
    return Aligned(found.token, place, keep, (rows - 1).clamp(min=0), count)


def apply_chunks(
    x: torch.Tensor,
    chunks: Chunks,
    *,
    documents: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [batch, length, channels] -> the same and the state [batch, channels, numbers / 2, 2]. Where `chunks` know two
    directions, each token hears of those after it, too, and there is no state."""
    (batch, length, channels), size, wide = x.shape, chunks.within.shape[-1], chunks.within.dtype
    with without_autocast(x):
        found = None if documents is None else aligned(documents, size)
        state = None if initial_state is None else initial_state.to(wide).flatten(-2).transpose(0, 1)
        rows = in_rows(x.to(wide), size, found)  # [channels, batch * chunks, size]
        added = chunks.take_in(rows).unflatten(1, (batch, -1)).transpose(1, 2)
        before = carried(chunks, added, None if found is None else found.keep.T, state)
        heard = before.transpose(1, 2).reshape(channels, rows.shape[1], -1)
        output = in_text(torch.baddbmm(rows @ chunks.within, heard, chunks.out_of), batch, length, found)
        if not output_final_state:
            return output.to(x.dtype), None
        if found is None:
            whole = torch.full((batch,), (length - 1) // size, device=x.device)
            last, count = whole, length - whole * size
        else:
            last, count = found.last, found.count
        state = final_state(chunks, rows.unflatten(1, (batch, -1)), before, last, count)
    return output.to(x.dtype), state.transpose(0, 1).unflatten(-1, (-1, 2))


def in_rows(x: torch.Tensor, size: int, found: Aligned | None) -> torch.Tensor:
    """[batch, length, channels] -> [channels, batch * chunks, size], zero where no token is."""
    batch, length, channels = x.shape
    if found is not None:
        tokens = x.new_zeros(found.keep.numel() * size, channels)
        tokens = tokens.index_put((found.place,), x.flatten(0, 1)[found.token])
    else:
        tokens = (F.pad(x, (0, 0, 0, -length % size)) if length % size else x).flatten(0, 1)
    return tokens.T.contiguous().unflatten(1, (-1, size))


def in_text(rows: torch.Tensor, batch: int, length: int, found: Aligned | None) -> torch.Tensor:
    """The inverse of `in_rows`."""
    tokens = rows.flatten(1).T
    if found is None:
        return tokens.unflatten(0, (batch, -1))[:, :length]
    empty = tokens.new_zeros(batch * length, tokens.shape[1])
    return empty.index_put((found.token,), tokens[found.place]).unflatten(0, (batch, length))


def carried(chunks: Chunks, added: torch.Tensor, keep, state) -> torch.Tensor:
    """The states that chunks begin with, and, where there are two directions, those that come from after them."""
    numbers = chunks.numbers
    before = one_way(chunks, added[..., :numbers], keep, state)
    if added.shape[-1] == numbers:
        return before
    if keep is not None:  # backwards a chunk goes on with the one after it
        keep = F.pad(keep[1:], (0, 0, 0, 1), value=True).flip(0)
    after = one_way(chunks, added[..., numbers:].flip(1), keep, None).flip(1)
    return torch.cat((before, after), dim=-1)


def one_way(chunks: Chunks, added: torch.Tensor, keep, state) -> torch.Tensor:
    """What leaves a chunk after which a document begins is nothing."""
    if keep is None:
        return chunks.carry(added, None, state)
    left = F.pad(keep[1:], (0, 0, 0, 1), value=True)
    return chunks.carry(added * left[..., None], left, None if state is None else state * keep[0][:, None])


def final_state(chunks: Chunks, rows, before, last: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The state after `count` [batch] tokens of the chunk `last` [batch]: rows [channels, batch, chunks, size], before
    [channels, chunks, batch, numbers]."""
    batch, size = torch.arange(len(last), device=last.device), rows.shape[-1]
    ended = (torch.arange(size, device=last.device) + count[:, None]) % size  # moved to the end of the chunk
    tokens = rows[:, batch, last].gather(-1, ended.expand(len(rows), -1, -1))
    return chunks.advance(before[:, last, batch], count) + chunks.take_in(tokens)


def toeplitz(after: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """[channels, size, size] that takes a token (the first size) to those `after` it, lags 0, 1, ... [channels, size],
    and to those before it, lags 1, 2, ... [channels, size - 1]."""
    size = after.shape[-1]
    before = torch.zeros_like(after[..., 1:]) if before is None else before
    return torch.cat((before.flip(-1), after), dim=-1).unfold(-1, size, 1).flip(-2)
