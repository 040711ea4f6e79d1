"""Embeddings that begin as word vectors of others: word2vec (Mikolov et al., 2013, arXiv:1301.3781), GloVe (Pennington
et al., 2014, "GloVe: Global Vectors for Word Representation") and fastText, in their text formats."""

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

AT_ONCE = 4096  # words that are tokenized together


@dataclass(frozen=True)
class Found:
    """How many rows of the embeddings were set: `words` by the vector of a word that is one token, `pieces` by the mean
    over the words that a token is a piece of."""

    words: int
    pieces: int
    vocabulary: int

    @property
    def share(self) -> float:
        """Of the vocabulary, what now begins as word vectors."""
        return (self.words + self.pieces) / self.vocabulary

    def __str__(self) -> str:
        return (
            f"Word vectors for {self.share:.1%} of the {self.vocabulary:,} tokens: {self.words:,} are words of the "
            f"file, {self.pieces:,} pieces of such."
        )


def load_word_vectors(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path, pieces: bool = True
) -> Found:
    """Set the model's input embeddings, in place, to the word vectors of a file; a tied head follows.

    path: text of "word number number ..." lines, with or without word2vec's first line "words size"; `.gz` too. A word
    that is one token, at the beginning of a text or after a space, gives the token its vector. With `pieces`, a token
    that is no word is the mean of all words that it is a piece of. Other tokens, and special ones, keep what they have.

    Vectors that are wider than the embeddings are projected onto their principal components: of all linear maps it
    changes distances least. Narrower ones raise ValueError, for there is nothing to fill the rest with. Vectors are
    scaled to the mean length that the embeddings have, which the rest of the initialisation counts on. A damaged file
    raises ValueError that names the line. Example:

        found = hf_arch.load_word_vectors(model, tokenizer, "glove.6B.100d.txt.gz")
        print(found)
    """
    embeddings = model.get_input_embeddings().weight
    size = embeddings.shape[1]
    whole, parts = Sums(len(tokenizer)), Sums(len(tokenizer))
    entries = read_word_vectors(path)
    while some := list(islice(entries, AT_ONCE)):
        words, vectors = [word for word, _ in some], np.stack([vector for _, vector in some])
        if vectors.shape[1] < size:
            raise ValueError(
                f"The vectors of {path} have {vectors.shape[1]} numbers, the embeddings {size}: take wider vectors, or "
                f"a model with hidden_size={vectors.shape[1]} or less."
            )
        for texts in (words, [f" {word}" for word in words]):
            for ids, vector in zip(tokenizer(texts, add_special_tokens=False)["input_ids"], vectors, strict=True):
                (whole if len(ids) == 1 else parts).add(ids, vector)
    if not whole.counts.any() and not parts.counts.any():
        raise ValueError(f"{path} has no word that the tokenizer knows.")
    of_pieces = (parts.counts > 0) & (whole.counts == 0) & pieces
    means = np.where((whole.counts > 0)[:, None], whole.means(), parts.means())
    found = (whole.counts > 0) | of_pieces
    found[tokenizer.all_special_ids] = False
    put(embeddings, np.flatnonzero(found), means[found])
    return Found(int((found & ~of_pieces).sum()), int((found & of_pieces).sum()), len(tokenizer))


class Sums:
    """For each token the sum of the vectors that it was given, and their number."""

    def __init__(self, vocabulary: int):
        self.totals: np.ndarray | None = None  # [vocabulary, size], when the size is known
        self.counts = np.zeros(vocabulary, dtype=np.int64)

    def add(self, ids: list[int], vector: np.ndarray) -> None:
        if self.totals is None:
            self.totals = np.zeros((len(self.counts), len(vector)), dtype=np.float32)
        for token in set(ids):
            self.totals[token] += vector
            self.counts[token] += 1

    def means(self) -> np.ndarray:
        return np.zeros((len(self.counts), 1)) if self.totals is None else self.totals / self.counts[:, None].clip(1)


@torch.no_grad()
def put(embeddings: torch.Tensor, tokens: np.ndarray, vectors: np.ndarray) -> None:
    """Rows `tokens` of the embeddings [vocabulary, size] become `vectors` [tokens, size or wider], scaled."""
    size = embeddings.shape[1]
    if vectors.shape[1] > size:
        centred = vectors - vectors.mean(0)
        _, directions = np.linalg.eigh(centred.T @ centred)  # from the least to the greatest
        vectors = centred @ directions[:, ::-1][:, :size]
    told = torch.tensor(vectors, dtype=torch.float32)
    length = embeddings.float().norm(dim=1).mean()
    told = told * (length / told.norm(dim=1).mean().clamp(min=1e-12)).cpu()
    embeddings[torch.tensor(tokens, device=embeddings.device)] = told.to(embeddings)


def read_word_vectors(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """(word, vector [size] (float32)) of each line of a text file of word vectors, in memory for one."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    size = words = None
    count = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                told = f"{path}, line {number},"
                fields = decoded(line, told).rstrip().split(" ")
                if number == 1 and len(fields) == 2 and all(field.isdigit() for field in fields):
                    words, size = map(int, fields)
                    continue
                size = size or len(fields) - 1
                yield " ".join(fields[:-size]), numbers(fields[-size:], size, len(fields), told)
                count += 1
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is damaged after line {count}: {error}. Fetch it anew.") from None
    if not count:
        raise ValueError(f"{path} holds no word vectors.")
    if words is not None and count != words:
        raise ValueError(f"{path} promises {words} words in its first line and has {count}: it was cut short.")


def decoded(line: bytes, told: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{told} is not UTF-8 text. A binary word2vec file must be converted to text.") from None


def numbers(fields: list[str], size: int, count: int, told: str) -> np.ndarray:
    """The last `size` of `count` fields of a line; the rest is the word, which may hold spaces."""
    if size < 1 or count <= size:
        raise ValueError(f"{told} is not a word and {max(size, 1)} numbers.")
    try:
        vector = np.array(fields, dtype=np.float32)
    except ValueError:
        raise ValueError(f"{told} is not a word and {size} numbers: {' '.join(fields[:3])} ...") from None
    if not np.isfinite(vector).all():
        raise ValueError(f"{told} has a number that is not finite.")
    return vector
