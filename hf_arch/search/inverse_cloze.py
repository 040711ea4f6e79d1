"""Pairs for search from texts alone: the inverse cloze task (Lee et al., 2019, arXiv:1906.00300, section 4)."""

import random
import re
from collections.abc import Iterable

HEADING = re.compile(r"^(.+)\n[*=~\-^]{3,}$", re.MULTILINE)  # underlined, as in reStructuredText
SENTENCE_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z\"“])|\n\s*\n")
FEWEST, MOST = 6, 40  # words of a sentence that is asked

Pair = dict[str, str | int]


def inverse_cloze(texts: Iterable[str], characters: int = 400, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Sentences, each with the passage that it was taken out of: (pairs to learn from, pairs held out).

    A passage is whole sentences of one section, of `characters` and the rest of a sentence. Of each passage one
    sentence is held out, drawn by `seed`: it is in no pair to learn from, and its pair has the passage without it. The
    others, and the heading of the section, are what to learn from. A pair is {"query", "positive", "passage"}, the last
    the place of the passage among the pairs held out, for a `ContrastiveCollator`. Raises ValueError where there are
    not two passages with two sentences of 6 to 40 words.
    """
    draw, train, held_out = random.Random(seed), [], []
    for heading, sentences in (passage for text in texts for passage in passages(text, characters)):
        told = [sentence for sentence in sentences if FEWEST <= len(sentence.split()) <= MOST]
        if len(told) < 2:
            continue
        asked = draw.choice(told)
        rest = [sentence for sentence in sentences if sentence != asked]
        title, number = ([f"{heading}."] if heading else []), {"passage": len(held_out)}
        held_out.append({"query": asked, "positive": " ".join(title + rest)} | number)
        if heading:
            train.append({"query": heading, "positive": " ".join(rest)} | number)
        for sentence in told:
            others = [other for other in rest if other != sentence]
            if sentence != asked and others:
                train.append({"query": sentence, "positive": " ".join(title + others)} | number)
    if len(held_out) < 2:
        raise ValueError(f"There are {len(held_out)} passages with two sentences: give more text, or longer passages.")
    return train, held_out


def passages(text: str, characters: int) -> list[tuple[str, list[str]]]:
    """Parts of sections: the heading, or nothing, and some sentences that stand together."""
    found = []
    parts = ["", *HEADING.split(text)]
    for heading, section in zip(parts[::2], parts[1::2], strict=True):
        sentences: list[str] = []
        for sentence in filter(None, (" ".join(each.split()) for each in SENTENCE_END.split(section))):
            if not sentences or sum(map(len, sentences)) > characters:
                found.append((heading, sentences := []))
            sentences.append(sentence)
    return found
