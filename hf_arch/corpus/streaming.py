"""Texts from files of any size, one at a time, and a corpus of them: cleaned, without duplicates, split in two."""

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from hf_arch.corpus.cleaning import clean
from hf_arch.corpus.duplicates import NearDuplicates, SeenParagraphs

LONGEST = 1 << 16  # characters of a document; where a file goes on, another begins
SEPARATORS = {"<|endoftext|>", "\f"}  # lines that part the documents of a file
AT_ONCE = 64  # texts that a tokenizer is given


def read_documents(path: str | Path, longest: int = LONGEST) -> Iterator[str]:
    """The texts of a file, in memory for one of `longest` characters: of a `.jsonl` the "text" of each line, of any
    other file what stands between lines of `<|endoftext|>` or a form feed; longer ones are cut at the end of a line.
    A name that ends with `.gz` is of a compressed file.

    Raises ValueError that names the line for what is no UTF-8, or no JSON with a "text".
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    read = read_json_lines if path.name.removesuffix(".gz").endswith((".jsonl", ".ndjson")) else read_text
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            yield from read(file, path, longest)
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}. Unpack it anew, or leave it out.") from None


def lines_of(file: IO[bytes], path: Path, longest: int) -> Iterator[tuple[int, str]]:
    """Numbered lines; one that is longer than `longest` bytes comes in parts, cut between characters."""
    number, rest = 1, b""
    while part := file.readline(longest):
        part, rest = rest + part, b""
        if not part.endswith(b"\n") and len(part) > 4:
            whole = next(end for end in range(len(part), len(part) - 4, -1) if ends_whole(part[:end]))
            part, rest = part[:whole], part[whole:]
        yield number, decoded(part, path, number)
        number += part.endswith(b"\n")
    if rest:
        yield number, decoded(rest, path, number)


def ends_whole(part: bytes) -> bool:
    """Whether the last character of UTF-8 bytes is complete."""
    tail = part[-4:]
    lead = next((place for place in range(len(tail) - 1, -1, -1) if tail[place] & 0xC0 != 0x80), None)
    if lead is None:
        return True  # no UTF-8 at all, which decoding will say
    first = tail[lead]
    return len(tail) - lead >= (4 if first >= 0xF0 else 3 if first >= 0xE0 else 2 if first >= 0xC0 else 1)


def decoded(line: bytes, path: Path, number: int) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path}, line {number}, is not UTF-8 text. Convert the file, or leave it out.") from None
    if "\0" in text:
        raise ValueError(f"{path}, line {number}, holds zero bytes: it is not text. Leave the file out.")
    return text


def read_text(file: IO[bytes], path: Path, longest: int) -> Iterator[str]:
    document, size = [], 0
    for _, line in lines_of(file, path, longest):
        ends = line.rstrip("\r\n") in SEPARATORS
        if document and (ends or size + len(line) > longest):
            yield "".join(document)
            document, size = [], 0
        if not ends:
            document.append(line)
            size += len(line)
    if document:
        yield "".join(document)


def read_json_lines(file: IO[bytes], path: Path, longest: int) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f'{path}, line {number}, is not a JSON object with a "text".') from None
            if not isinstance(text, str):
                raise ValueError(f'{path}, line {number}: its "text" is not a string.')
            yield from (text[start : start + longest] for start in range(0, len(text), longest))


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read again and again, each time from the first, in memory for one and for what `threshold`
    and `paragraphs` ask to remember.

    read (`Callable`): begins to read texts. boilerplate: lines to drop (`boilerplate_lines`). threshold: of near
    duplicates, None to keep them. paragraphs: whether a paragraph counts once in all the corpus. held_out: the share of
    the text that is kept apart: a document is, when with it no more than that share of what was read so far would be.
    """

    read: Callable[[], Iterator[str]]
    boilerplate: frozenset[str] = frozenset()
    threshold: float | None = 0.8
    paragraphs: bool = True
    held_out: float = 0.1

    @classmethod
    def of_files(cls, paths: Sequence[str | Path], **options) -> "Corpus":
        return cls(lambda: (text for path in paths for text in read_documents(path)), **options)

    def texts(self) -> Iterator[str]:
        near = NearDuplicates(self.threshold) if self.threshold is not None else None
        seen = SeenParagraphs() if self.paragraphs else None
        for text in self.read():
            text = clean(text, self.boilerplate)
            if text and near is not None and not near.is_new(text):
                continue
            text = seen.new_part(text) if seen is not None else text
            if text:
                yield text

    def part(self, held_out: bool) -> Iterator[str]:
        """The texts to train on, or those that are held out."""
        read = apart = 0
        for text in self.texts():
            read += len(text)
            fits = apart + len(text) <= self.held_out * read
            apart += len(text) * fits
            if fits == held_out:
                yield text


def token_documents(
    texts: Iterator[str], tokenizer: PreTrainedTokenizerBase, begin: bool = True
) -> Iterator[list[int]]:
    """The tokens of each text, the tokenizer's [EOS] after it and, with `begin`, its [BOS] (or [EOS]) before."""
    end = tokenizer.eos_token_id
    first = [end if tokenizer.bos_token_id is None else tokenizer.bos_token_id] if begin else []
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    while some := list(islice(texts, AT_ONCE)):
        for ids in tokenizer(some, **options)["input_ids"]:
            yield [*first, *ids, end]


def streamed(rows: Callable[[], Iterator[dict]]) -> IterableDataset:
    """What `rows` yields as a dataset that is read while a Trainer trains, shuffled within 1000 rows."""
    return IterableDataset.from_generator(rows).shuffle(seed=0, buffer_size=1000)
