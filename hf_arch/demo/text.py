"""The demo's text: what every CPython carries, or the user's own files; split into training and held-out documents."""

import random
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

MANY = 20  # documents; where there are fewer, each is cut into that many pieces
FEWEST_CHARACTERS = 20_000
FEWEST_HELD_OUT = 1_000
SHORT_MODULE = 12_000  # bytes


@dataclass(frozen=True)
class Document:
    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and, apart from them, documents to measure with."""

    name: str
    train: list[Document]
    held_out: list[Document]

    def __str__(self) -> str:
        train, held_out = (
            f"{len(part)} documents of {characters(part):,} characters" for part in (self.train, self.held_out)
        )
        return f"{self.name.capitalize()}: {train} to learn, {held_out} held out"


def python_manual() -> list[Document]:
    """The parts of Python's language reference that `help()` shows: prose, with grammar and examples."""
    return [Document(name, text) for name, text in sorted(topics.items())]


def python_source() -> list[Document]:
    """The shorter modules of the standard library: many, so that a tenth of them is a fair sample."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    return [Document(path.name, path.read_text("utf-8")) for path in paths if path.stat().st_size < SHORT_MODULE]


def read_files(paths: Iterable[str | Path]) -> list[Document]:
    return [Document(str(path), read_file(Path(path))) for path in paths]


def read_file(path: Path) -> str:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {path}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (see byte {error.start}). Convert it, or leave it out.") from None
    if "\0" in text:
        raise ValueError(f"{path} is not text: it holds zero bytes. Leave it out.")
    if not text.strip():
        raise ValueError(f"{path} is empty. Leave it out.")
    return text


def split(name: str, documents: list[Document], seed: int = 0) -> Corpus:
    """Hold out documents drawn at random, as many as fit into a tenth of the text. Raises ValueError for too little."""
    documents = without_repeats(documents)
    if len(documents) < MANY:
        documents = [piece for document in documents for piece in cut(document)]
    size = characters(documents)
    if size < FEWEST_CHARACTERS:
        raise ValueError(
            f"{name.capitalize()} has {size:,} characters; a model and its measure need at least "
            f"{FEWEST_CHARACTERS:,}. Give more or longer files. (A file that repeats another does not count.)"
        )
    random.Random(seed).shuffle(documents)
    train, held_out = [], []
    for document in documents:
        fits = 10 * (characters(held_out) + len(document.text)) <= size
        (held_out if fits else train).append(document)
    if characters(held_out) < FEWEST_HELD_OUT:
        raise ValueError(f"In {name} the short files are too little to be held out beside a long one. Leave them out.")
    return Corpus(name, train, held_out)


def without_repeats(documents: list[Document]) -> list[Document]:
    """Drop each document most of whose paragraphs are in a larger one.

    The manual has sections that contain others, word for word; held-out text that was trained on measures memory.
    """
    kept, seen = [], set()
    for document in sorted(documents, key=lambda document: (-len(document.text), document.name)):
        own = paragraphs(document.text)
        repeated = sum(len(paragraph) for paragraph in own if paragraph in seen)
        if 2 * repeated <= sum(map(len, own)):
            kept.append(document)
            seen.update(own)
    return kept


def paragraphs(text: str) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def cut(document: Document) -> list[Document]:
    size = -(-len(document.text) // MANY)
    starts = range(0, len(document.text), size)
    return [Document(f"{document.name}:{start}", document.text[start : start + size]) for start in starts]


def characters(documents: list[Document]) -> int:
    return sum(len(document.text) for document in documents)
