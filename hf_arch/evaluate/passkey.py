"""A number hidden in a long text, to be found again (Mohtashami and Jaggi, 2023, arXiv:2305.16300, section 4.2)."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from hf_arch.evaluate.reading import Reader

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = " What is the pass key? The pass key is"
ANSWER = " {key}"


@dataclass(frozen=True)
class Cell:
    """Of the picture: some trials at one length and depth."""

    length: int
    depth: float  # 0: before all of the filler, 1: after it
    trials: int
    retrieved: float  # share of the trials in which greedy decoding would write the key
    tokens_right: float  # share of the key's tokens that are right once those before them are


class Prompts:
    """Prompts of exact lengths in tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prefix: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.start, self.filler, self.question = [*prefix, *self.ids(TASK)], self.ids(FILLER), self.ids(QUESTION)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def make(self, length: int, depth: float, key: int) -> tuple[list[int], int]:
        """`length` tokens, and how many at their end are the key. Raises ValueError where they do not fit."""
        needle, answer = self.ids(NEEDLE.format(key=key)), self.ids(ANSWER.format(key=key))
        room = length - len(self.start) - len(needle) - len(self.question) - len(answer)
        if room < 0:
            raise ValueError(f"A pass key does not fit into {length} tokens: it takes {length - room}.")
        filler = self.filler * (room // len(self.filler) + 1)
        before = round(depth * room)
        return [*self.start, *filler[:before], *needle, *filler[before:room], *self.question, *answer], len(answer)

    def fits(self, length: int) -> bool:
        try:
            self.make(length, 0.0, 98765)
        except ValueError:
            return False
        return True


def look_for_keys(
    reader: Reader, prompts: Prompts, lengths: Sequence[int], depths: Sequence[float], trials: int, seed: int = 0
) -> Iterator[Cell]:
    """One cell at a time; lengths that no prompt fits into are left out."""
    for length in filter(prompts.fits, lengths if trials else ()):
        for depth in depths:
            keys = random.Random(f"{seed} {length} {depth}")
            found = [
                look_for_key(reader, prompts, length, depth, keys.randrange(10_000, 100_000)) for _ in range(trials)
            ]
            whole, shares = zip(*found, strict=True)
            yield Cell(length, depth, trials, sum(whole) / trials, sum(shares) / trials)


def look_for_key(reader: Reader, prompts: Prompts, length: int, depth: float, key: int) -> tuple[bool, float]:
    """Whether the key is found, and the share of its tokens. One pass with the key at the end is enough: greedy
    decoding writes the key exactly if each of its tokens is the most probable one after those before it."""
    ids, asked = prompts.make(length, depth, key)
    right = reader.read(torch.tensor([ids]), last=asked).right
    return bool(right.all()), right.double().mean().item()
