"""How much of what a recurrence took in is left later, where it fades by a factor per token and head.

Decays are logarithms, 0 or less, and are added up over the real tokens of a document; nothing crosses into another one.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .documents import document_runs


class Fading(NamedTuple):
    """What is left, chunk by chunk, [batch or 1, chunks, heads, ...]."""

    within: torch.Tensor  # [size, size] of what a step of the chunk took in at another, zero before that one
    into: torch.Tensor  # [size, 1] of the state at the start of the chunk, at a step
    out_of: torch.Tensor  # [size, 1] of what a step took in, at the end of the chunk
    across: torch.Tensor  # [1, 1] of the state at the start, at the end


def fading(log_decay: torch.Tensor, documents: torch.Tensor | None, chunk_size: int) -> Fading:
    """`log_decay` [batch, length, heads], `documents` [batch, length]: see `documents.py`."""
    pad = -log_decay.shape[1] % chunk_size
    if documents is not None:
        real, document = document_runs(documents, log_decay)
        log_decay = log_decay * real[..., None]
    left = F.pad(log_decay, (0, 0, 0, pad)).unflatten(1, (-1, chunk_size)).transpose(2, 3).cumsum(-1)
    return fading_of_sums(left, None if documents is None else linked(document, chunk_size))


def fading_of_sums(left: torch.Tensor, links: "Links | None") -> Fading:
    """The same by the sums of log decays in each chunk, [batch, chunks, heads, size]. No gradient passes."""
    last = left[..., -1:]
    into, out_of, across = left.exp()[..., None], (last - left).exp_()[..., None], last.exp()[..., None]
    # Above the diagonal decays are undone: whatever that is, it is overwritten, not multiplied
    within = (left[..., :, None] - left[..., None, :]).exp_().tril_()
    if links is None:
        return Fading(within, into, out_of, across)
    into, out_of = into * links.into, out_of * links.out_of
    return Fading(within.masked_fill_(~links.within, 0), into, out_of, into[..., -1:, :])


class Links(NamedTuple):
    """Whether tokens are of one document, chunk by chunk, [batch, chunks, 1, ...]; padding belongs to that before."""

    within: torch.Tensor  # [size, size] two steps of the chunk
    into: torch.Tensor  # [size, 1] a step, and what the state at the start of the chunk belongs to
    out_of: torch.Tensor  # [size, 1] a step, and the end of the chunk


def linked(document: torch.Tensor, chunk_size: int) -> Links:
    """`document` [batch, length] is the number of each token's document, as `document_runs` has it."""
    document = F.pad(document, (0, -document.shape[1] % chunk_size), mode="replicate")
    document = document.unflatten(1, (-1, chunk_size))[:, :, None, :, None]
    carried = F.pad(document[:, :-1, :, -1:], (0, 0, 0, 0, 0, 0, 1, 0), value=1)
    return Links(document == document.mT, document == carried, document == document[..., -1:, :])


def chunked(x: torch.Tensor, size: int) -> torch.Tensor:
    """[batch, length, heads, dim] -> [batch, chunks, heads, size, dim], zero past the end; a view where it can be."""
    if pad := -x.shape[1] % size:
        x = F.pad(x, (0, 0, 0, 0, 0, pad))
    return x.unflatten(1, (-1, size)).transpose(2, 3)


def in_chunks(x: torch.Tensor, size: int) -> torch.Tensor:
    """The same, laid out anew."""
    return chunked(x, size).contiguous()


def carry(added: torch.Tensor, across: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence between chunks, state = across * state + added: the states [batch, chunks, ...] at the starts of
    the chunks, and the one at the end. `added` and `across` are [batch or 1, chunks, ...], in the type of the state."""
    state, before = torch.zeros_like(added[:, 0]) if state is None else state, []
    for new, kept in zip(added.unbind(1), across.unbind(1), strict=True):  # the gradient of an index is a whole tensor
        before.append(state)
        state = torch.addcmul(new, kept, state)
    return torch.stack(before, dim=1), state
