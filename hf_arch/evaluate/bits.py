"""Bits per byte by position in a text, and of the same tokens by how much text is before them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_arch.evaluate.reading import Reader

FIRST_EDGE = 16  # positions below are one point of the curve


@dataclass(frozen=True)
class Tokens:
    """A text as a model is told it."""

    ids: torch.Tensor  # [tokens]
    size: int  # in bytes of UTF-8
    prefix: tuple[int, ...] = ()  # what the tokenizer puts before every text

    def ending_at(self, ends: Sequence[int], length: int) -> torch.Tensor:
        """[ends, length]: the prefix, and the text before each end."""
        prefix = self.ids.new_tensor(self.prefix)
        room = length - len(prefix)
        return torch.stack([torch.cat((prefix, self.ids[end - room : end])) for end in ends])

    def bits_per_byte(self, nats: torch.Tensor) -> "Estimate":
        """[windows, tokens] -> the mean; every token counts as the mean number of bytes of the text's tokens."""
        bits = nats.double().mean(-1) / math.log(2) * len(self.ids) / self.size
        error = (bits.std() / math.sqrt(len(bits))).item() if len(bits) > 1 else None
        return Estimate(bits.mean().item(), error)


@dataclass(frozen=True)
class Estimate:
    bits_per_byte: float
    error: float | None  # standard error over the windows


@dataclass(frozen=True)
class AtPositions(Estimate):
    first: int  # position 0 is given
    last: int


@dataclass(frozen=True)
class AtContext(Estimate):
    length: int  # of the window, the measured tokens at its end included


def window_ends(tokens: int, length: int, most: int) -> list[int]:
    """Where windows end that are spread evenly over the text and do not overlap."""
    if tokens < length:
        raise ValueError(f"The text has {tokens:,} tokens, too few for a length of {length:,}: give a longer text.")
    count = min(most, tokens // length)
    return [length + i * (tokens - length) // max(count - 1, 1) for i in range(count)]


def measure(
    reader: Reader, text: Tokens, lengths: Sequence[int], windows: int
) -> tuple[list[AtPositions], list[AtContext]]:
    """By position in windows of the longest length, and by length over the last tokens of the same windows."""
    lengths = sorted(lengths)
    shortest, longest = lengths[0], lengths[-1]
    asked = shortest // 2  # each has half of the shortest length before it, or more
    ends = window_ends(len(text.ids), longest, windows)
    whole = reader.read(text.ending_at(ends, longest)).nats
    contexts = []
    for length in lengths:
        texts = text.ending_at(ends, length)
        nats = whole[:, -asked:] if length == longest else reader.read(texts, last=asked).nats
        contexts.append(AtContext(**vars(text.bits_per_byte(nats)), length=length))
    edges = [1, *(FIRST_EDGE << i for i in range(longest.bit_length()) if FIRST_EDGE << i < longest), longest]
    positions = [
        AtPositions(**vars(text.bits_per_byte(whole[:, first - 1 : end - 1])), first=first, last=end - 1)
        for first, end in zip(edges[:-1], edges[1:], strict=True)
    ]
    return positions, contexts
