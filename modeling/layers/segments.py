"""Text in segments, and segments in segments: a hierarchy of levels over real tokens, whatever lies between them.

At level 0 segments are made of tokens, at each further level of the first tokens (leaders) of the segments below. The
segment of the last level is the document. A segment starts where a document does, where the caller says so, and where
the one before has reached its length.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..ops.documents import EvenlyUnpacked, Unpacked, document_starts, left_aligned


class Hierarchy(NamedTuple):
    """levels: the members of each level's segments, as rows.
    leaders: those of level 0, a row per document.
    places: [batch or 1, length] the place of each token in its segment of level 0."""

    levels: list[Unpacked | EvenlyUnpacked]
    leaders: Unpacked | EvenlyUnpacked
    places: torch.Tensor


def find_segments(
    tokens: torch.Tensor, documents: torch.Tensor | None, starts: torch.Tensor | None, lengths: Sequence[int]
) -> Hierarchy:
    """The hierarchy of a batch `tokens` [batch, length, ...].

    documents: [batch, length] as in `ops/documents.py`.
    starts: [batch, length] at each token, how many levels begin a segment there (1: a sentence, 2: also a paragraph).
    lengths: the most members of a segment, of each level.

    Raises ValueError where a document has more segments than the last level holds, or a row is all padding.
    """
    if documents is None and starts is None:
        return even_segments(tokens, lengths)
    if documents is None:
        documents = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    return given_segments(documents, starts, lengths)


def even_segments(tokens: torch.Tensor, lengths: Sequence[int]) -> Hierarchy:
    """Whole rows cut at equal lengths."""
    batch, length = tokens.shape[:2]

    def level(stride: int, size: int) -> EvenlyUnpacked:
        return EvenlyUnpacked(stride, min(size, -(-length // stride)), batch, length, tokens.device)

    levels, stride = [], 1
    for size in lengths:
        levels.append(level(stride, size))
        stride *= size
    check_members(levels[-1].tokens, lengths)
    places = torch.arange(length, device=tokens.device)[None] % levels[0].size
    return Hierarchy(levels, level(lengths[0], length), places)


def given_segments(documents: torch.Tensor, starts: torch.Tensor | None, lengths: Sequence[int]) -> Hierarchy:
    """Rows of any make: padded, packed, with segments of the caller's."""
    batch, length = documents.shape
    token, fresh = document_starts(documents)
    if not torch.compiler.is_compiling() and len(empty := (documents == 0).all(dim=1).nonzero()):
        raise ValueError(f"Row {int(empty[0])} has no real token: attention_mask hides all of it. Leave it out.")
    marks = torch.zeros_like(token) if starts is None else starts.flatten()[token]
    levels, leaders = [], None
    for number, size in enumerate(lengths[:-1]):
        begins = fresh | (marks > number)
        begins = begins | (left_aligned(token, begins, length).place % size == 0)
        levels.append(left_aligned(token, begins, length))
        token, fresh, marks = token[begins], fresh[begins], marks[begins]
        leaders = leaders or left_aligned(token, fresh, length)
    levels.append(left_aligned(token, fresh, length))
    leaders = leaders or left_aligned(token[fresh], fresh[fresh], length)
    check_members(levels[-1].longest, lengths)
    places = torch.zeros_like(documents).flatten().index_put((levels[0].token,), levels[0].place)
    return Hierarchy(levels, leaders, places.view(batch, length))


def check_members(members: int, lengths: Sequence[int]) -> None:
    if members > lengths[-1]:
        what = "tokens" if len(lengths) == 1 else f"segments of level {len(lengths) - 2}"
        raise ValueError(
            f"A document has {members} {what}, and the model places for {lengths[-1]} (max_position_embeddings): "
            "cut the text."
        )
