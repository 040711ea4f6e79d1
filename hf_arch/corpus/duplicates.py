"""Text that was read before: the same paragraphs by their hashes, nearly the same documents by MinHash (Broder, 1997,
"On the resemblance and containment of documents") and locality-sensitive hashing (Leskovec, Rajaraman and Ullman,
"Mining of Massive Datasets", sections 3.2 to 3.4).

Both go through a corpus once, document by document: in `datasets`, `dataset.filter(NearDuplicates().is_new,
input_columns="text")`, in one process. What they remember belongs to one pass, so that a stream that is read again
needs new ones: `hf_arch.corpus.streaming.Corpus` makes them.
"""

import re
from hashlib import blake2b

import numpy as np

SHINGLE = 8  # bytes: as many as an integer has


def shingles(text: str) -> np.ndarray:
    """The different runs of 8 bytes of a text [count] (uint64), whose case and white space do not matter. A shorter
    text is one run, filled up with zeros."""
    told = " ".join(text.lower().split()).encode()
    told = np.frombuffer(told.ljust(SHINGLE, b"\0"), dtype=np.uint8)
    runs = np.lib.stride_tricks.sliding_window_view(told, SHINGLE)
    return np.unique(np.ascontiguousarray(runs).view("<u8"))


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """|A & B| / |A | B| of two sets, what MinHash estimates."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)


def mixed(numbers: np.ndarray) -> np.ndarray:
    """Each of 64 bits rests on all of the number's own (splitmix64): letters alone would fall into few places."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


class MinHash:
    """The signature of a set: of `size` random orders of all numbers, which number of the set comes first in each.

    P(two sets agree at a place) is their Jaccard similarity J; the share of `size` places at which they do estimates it
    with a standard error of sqrt(J (1 - J) / size). The orders are x -> a x + b modulo 2^64, with odd a.
    """

    def __init__(self, size: int = 128, seed: int = 0):
        draw = np.random.default_rng(seed).integers(0, 2**64, (2, size), dtype=np.uint64)
        self.factors, self.offsets = draw[0] | np.uint64(1), draw[1]

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """[count] (uint64) -> [size] (uint32)."""
        numbers = mixed(numbers)
        least = [(numbers * a + b).min() for a, b in zip(self.factors, self.offsets, strict=True)]
        return (np.array(least) >> np.uint64(32)).astype(np.uint32)


class NearDuplicates:
    """Finds documents that share `threshold` of their runs of 8 bytes, or more, with one that came before.

    A signature of `size` numbers is cut into bands; documents that agree in a whole band are compared. Bands are as
    long as they may be for a pair at the threshold to be compared with a probability of 0.9; pairs above it are found
    more surely, and what is compared is counted a duplicate if the signatures agree in `threshold` of their places.
    Memory: about 3 kB for each document that is new, at the default sizes; no text is kept.
    """

    def __init__(self, threshold: float = 0.8, size: int = 128, seed: int = 0):
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}: a share lies above 0, and is 1 at most.")
        self.threshold, self.minhash = threshold, MinHash(size, seed)
        lengths = [rows for rows in range(1, size + 1) if size % rows == 0]
        self.rows = max((rows for rows in lengths if self.compared(threshold, size, rows) >= 0.9), default=1)
        self.bands: list[dict[bytes, list[int]]] = [{} for _ in range(size // self.rows)]
        self.signatures: list[np.ndarray] = []

    @staticmethod
    def compared(similarity: float, size: int, rows: int) -> float:
        """The probability that a pair of documents agrees in one of size / rows bands."""
        return 1 - (1 - similarity**rows) ** (size // rows)

    def is_new(self, text: str) -> bool:
        """Whether no earlier document is like this one, which is remembered if so."""
        signature = self.minhash(shingles(text))
        keys = [part.tobytes() for part in signature.reshape(-1, self.rows)]
        alike = {number for band, key in zip(self.bands, keys, strict=True) for number in band.get(key, ())}
        if any((self.signatures[number] == signature).mean() >= self.threshold for number in alike):
            return False
        for band, key in zip(self.bands, keys, strict=True):
            band.setdefault(key, []).append(len(self.signatures))
        self.signatures.append(signature)
        return True


class SeenParagraphs:
    """Drops paragraphs that were read before, and so a document that repeats another or is a part of it: the exact
    duplicates of CCNet (Wenzek et al., 2020, arXiv:1911.00359, section 3.1).

    White space and case do not matter. Paragraphs are told apart by 8 bytes of a hash; memory: about 100 bytes each.
    """

    def __init__(self):
        self.seen: set[int] = set()

    def new_part(self, text: str) -> str:
        """The paragraphs of the text that are new; "" where none is."""
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            told = " ".join(paragraph.lower().split()).encode()
            key = int.from_bytes(blake2b(told, digest_size=8).digest())
            if told and key not in self.seen:
                self.seen.add(key)
                kept.append(paragraph)
        return "\n\n".join(kept)
