"""Text in segments, and segments in segments: a hierarchy of levels over real tokens, whatever lies between them.

At level 0 segments are made of tokens, at each further level of the first tokens (leaders) of the segments below. The
segment of the last level is the document. A segment starts where a document does, where the caller says so, and where
the one before has reached its length.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..ops.documents import EvenlyUnpacked, Unpacked, document_numbers, document_starts, left_aligned


class EvenHierarchy(NamedTuple):
    """Whole rows cut at equal lengths."""

    batch: int
    length: int
    device: torch.device
    lengths: tuple[int, ...]  # the most members of a segment, of each level

    def stride(self, level: int) -> int:
        """How far apart the members of a level are."""
        return math.prod(self.lengths[:level])

    def rows(self, stride: int, size: int) -> EvenlyUnpacked:
        return EvenlyUnpacked(stride, min(size, -(-self.length // stride)), self.batch, self.length, self.device)

    def members(self, level: int) -> EvenlyUnpacked:
        """Each segment of a level as a row of its members."""
        return self.rows(self.stride(level), self.lengths[level])

    def tokens(self, level: int) -> EvenlyUnpacked:
        """Each segment of a level as a row of all tokens below it."""
        return self.rows(1, self.stride(level + 1))

    def first(self, level: int) -> EvenlyUnpacked:
        """Each segment of a level as a row of its leader alone."""
        return self.rows(self.stride(level + 1), 1)

    def leaders(self, level: int) -> EvenlyUnpacked:
        """Each document as a row of the leaders of its segments of a level."""
        return self.rows(self.stride(level + 1), self.length)

    @property
    def places(self) -> torch.Tensor:
        """[1, length] the place of each token in its segment of level 0."""
        return torch.arange(self.length, device=self.device)[None] % self.lengths[0]


class GivenHierarchy(NamedTuple):
    """The same of rows of any make: padded, packed, with segments of the caller's."""

    shape: tuple[int, int]  # batch, length
    token: torch.Tensor  # [tokens] index of each real token in the flattened batch
    begins: list[torch.Tensor]  # of each level, [tokens] whether a segment begins there
    below: torch.Tensor | None  # [tokens] whether levels below the last have a token; None: they have all

    def rows(self, chosen: torch.Tensor | None, starts: torch.Tensor, level: int) -> Unpacked:
        """The `chosen` tokens (None: all), in rows that begin where `starts` says."""
        if self.below is not None and level < len(self.begins) - 1:
            chosen = self.below if chosen is None else chosen & self.below
        token, starts = (self.token, starts) if chosen is None else (self.token[chosen], starts[chosen])
        return left_aligned(token, starts, self.shape[1])

    def members(self, level: int) -> Unpacked:
        return self.rows(self.begins[level - 1] if level else None, self.begins[level], level)

    def tokens(self, level: int) -> Unpacked:
        return self.rows(self.below, self.begins[level], level)

    def first(self, level: int) -> Unpacked:
        return self.rows(self.begins[level], self.begins[level], level)

    def leaders(self, level: int) -> Unpacked:
        return self.rows(self.begins[level], self.begins[-1], len(self.begins) - 1)

    @property
    def places(self) -> torch.Tensor:
        rows = self.members(0)
        places = torch.zeros(self.shape, dtype=torch.long, device=self.token.device)
        return places.flatten().index_put((rows.token,), rows.place).view(self.shape)


Segmentation = EvenHierarchy | GivenHierarchy


def find_segments(
    tokens: torch.Tensor,
    documents: torch.Tensor | None,
    starts: torch.Tensor | None,
    lengths: Sequence[int],
    carried: int = 0,
) -> Segmentation:
    """The hierarchy of a batch `tokens` [batch, length, ...].

    documents: [batch, length] as in `ops/documents.py`.
    starts: [batch, length] at each token, how many levels begin a segment there (1: a sentence, 2: also a paragraph).
    lengths: the most members of a segment, of each level.
    carried: how many columns at the beginning are no tokens, but members of the last level that were read before.

    Raises ValueError where a document has more segments than the last level holds, or a row is all padding.
    """
    batch, length = tokens.shape[:2]
    if documents is None and starts is None:
        text: Segmentation = EvenHierarchy(batch, length, tokens.device, tuple(lengths))
        check_members(text.members(len(lengths) - 1).tokens, lengths)
        return text
    text = given_segments(document_numbers(documents, tokens), starts, lengths, carried)
    check_members(text.members(len(lengths) - 1).longest, lengths)
    return text


def given_segments(
    documents: torch.Tensor, starts: torch.Tensor | None, lengths: Sequence[int], carried: int
) -> GivenHierarchy:
    token, fresh = document_starts(documents)
    length = documents.shape[1]
    if not torch.compiler.is_compiling() and len(empty := (documents == 0).all(dim=1).nonzero()):
        raise ValueError(f"Row {int(empty[0])} has no real token: attention_mask hides all of it. Leave it out.")
    marks = torch.zeros_like(token) if starts is None else starts.flatten()[token]
    begins = []
    members = torch.ones_like(fresh)
    for number, size in enumerate(lengths[:-1]):
        starting = (fresh | (marks > number))[members]
        starting = starting | (left_aligned(token[members], starting, length).place % size == 0)
        begins.append(torch.zeros_like(fresh).index_put((members.nonzero().squeeze(-1),), starting))
        members = begins[-1]
    return GivenHierarchy(
        tuple(documents.shape), token, [*begins, fresh], token % length >= carried if carried else None
    )


def check_members(members: int, lengths: Sequence[int]) -> None:
    if members > lengths[-1]:
        what = "tokens" if len(lengths) == 1 else f"segments of level {len(lengths) - 2}"
        raise ValueError(
            f"A document has {members} {what}, and the model places for {lengths[-1]} (max_position_embeddings): "
            "cut the text."
        )
