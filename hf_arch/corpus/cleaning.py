"""Texts in one form: Unicode, control characters, white space, lines that stand in many documents."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from itertools import islice

INVISIBLE = "\u00ad\u200b\u2060\ufeff"  # soft hyphen, zero-width space, word joiner, byte order mark
LINE_ENDS = re.compile(r"\r\n?|[\u0085\u2028\u2029\v\f]")
REMOVED = dict.fromkeys([*range(32), *range(127, 160), *map(ord, INVISIBLE)]) | {ord("\t"): "\t", ord("\n"): "\n"}


def normalise(text: str) -> str:
    """Characters in composed form (NFC), every end of line as \\n, no control and no invisible characters, and one kind
    of space. What joins letters and emoji (U+200C, U+200D) stays.

    >>> normalise("cafe\\u0301\\u00a0\\u200bau lait\\x07\\r\\n")
    'café au lait\\n'
    """
    text = unicodedata.normalize("NFC", LINE_ENDS.sub("\n", text)).translate(REMOVED)
    return "".join(" " if unicodedata.category(sign) == "Zs" else sign for sign in text) if not text.isascii() else text


def squeeze(text: str) -> str:
    """One space between words, no spaces at the ends of lines, one empty line between paragraphs. What a line begins
    with stays: in lists and in code it means something."""
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"(?<=\S)[ \t]{2,}", " ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def boilerplate_lines(texts: Iterable[str], share: float = 0.1, least: int = 5, sample: int = 10_000) -> frozenset[str]:
    """Lines that stand in `share` of the documents and in `least` of them: menus, licence headers, page footers.

    Looks at the first `sample` of the texts; the memory is that of their different lines. Lines without a letter, such
    as brackets and rules, are form, and stay.
    """
    counts: Counter[str] = Counter()
    seen = 0
    for text in islice(texts, sample):
        seen += 1
        counts.update({line.strip() for line in normalise(text).split("\n")})
    often = max(least, share * seen)
    return frozenset(line for line, count in counts.items() if count >= often and any(map(str.isalpha, line)))


def without_lines(text: str, lines: frozenset[str]) -> str:
    return "\n".join(line for line in text.split("\n") if line.strip() not in lines) if lines else text


def clean(text: str, boilerplate: frozenset[str] = frozenset()) -> str:
    """Normalised, without the `boilerplate` lines, squeezed; empty where nothing else was there.

    Example: `dataset.map(lambda row: {"text": clean(row["text"])}).filter(lambda row: row["text"])`.
    """
    return squeeze(without_lines(normalise(text), boilerplate))
