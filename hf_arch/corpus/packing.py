"""Documents as rows of one length: packed one after another, or cut into pieces that a collator pads."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

FILLERS = {"input_ids": 0, "labels": -100, "attention_mask": 0, "position_ids": 0}


def pack(documents: Iterable[Sequence[int]], length: int) -> Iterator[dict[str, list[int]]]:
    """Rows of `length` tokens without padding, but for the end of the last: where a document ends, the next begins.

    documents: token ids of each text, with what stands before and after it. Items are those of `hf_arch.Segments`,
    which `hf_arch.streams.collate_segments` makes batches of: {"input_ids", "labels" (the token that follows),
    "attention_mask", "position_ids"}. Positions restart with each document, so that packed documents do not meet; a
    document that a row has no more room for goes on in the next, from position 0. Every token of a document but its
    first is asked once.
    """
    if length < 1:
        raise ValueError(f"length is {length}: a row has at least one token.")
    row: dict[str, list[int]] = {name: [] for name in FILLERS}
    for document in documents:
        tokens, start = list(map(int, document)), 0
        while start < len(tokens) - 1:
            end = min(start + length - len(row["input_ids"]), len(tokens) - 1)
            row["input_ids"] += tokens[start:end]
            row["labels"] += tokens[start + 1 : end + 1]
            row["attention_mask"] += [1] * (end - start)
            row["position_ids"] += range(end - start)
            start = end
            if len(row["input_ids"]) == length:
                yield row
                row = {name: [] for name in FILLERS}
    if more := length - len(row["input_ids"]) if row["input_ids"] else 0:
        yield {name: values + [FILLERS[name]] * more for name, values in row.items()}


def pieces(documents: Iterable[Sequence[int]], length: int) -> Iterator[dict[str, list[int]]]:
    """{"input_ids"}: documents cut into as few pieces of at most `length` tokens as may be, of nearly the same size,
    for models that read one document a row. A document of one token is left out: there is nothing to hide in it."""
    if length < 2:
        raise ValueError(f"length is {length}: a piece has at least two tokens.")
    for document in documents:
        if len(document) > 1:
            for part in np.array_split(np.asarray(document), -(-len(document) // length)):
                yield {"input_ids": part.tolist()}
