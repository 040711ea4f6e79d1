"""Augmentation of text: tokens of a batch replaced, deleted and inserted, while what is asked stays what the text says
(Xie et al., 2017, arXiv:1703.02573, section 3; Wei and Zou, 2019, arXiv:1901.11196)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

WAYS = ("replace", "delete", "insert")
INSERTED = {"labels": -100, "shift_labels": -100, "attention_mask": 1, "position_ids": 1}  # beside an inserted token
FILLERS = {"labels": -100, "shift_labels": -100, "attention_mask": 0, "position_ids": 0, "input_ids": 0}


@dataclass
class NoisyCollator:
    """Batches of another collator, of whose input tokens a share of `rate` is touched: one in equal parts by each of
    the `ways`, replaced by a random token, deleted, or followed by a random one.

    The labels are made before: a model sees damaged text, and names the true one. A row keeps its width: it is padded
    on the right, or cut.

    - Next tokens told as "shift_labels" (`collate_segments`): every place is asked the true next token, though that
      may be deleted from the input; a deleted token's own question goes with it, an inserted token is asked nothing.
    - Masked tokens: what is asked is not touched. An encoder-decoder's answer is not, either.
    - Where the batch tells places as numbers ("prefix_length"), or keeps the text beside ("original_ids"), tokens can
      only be replaced.

    vocabulary (`Sequence[int]`): tokens to draw from. keep (`Sequence[int]`): tokens that stay, such as special ones;
    so do padding and the first token of each packed document. along: the columns whose places are those of the tokens;
    leave "labels" out where they are another text. Draws follow torch's generator, which a Trainer restores.
    """

    collator: Callable[[list[dict]], dict[str, torch.Tensor]]
    rate: float
    vocabulary: Sequence[int]
    keep: Sequence[int] = ()
    ways: Sequence[str] = WAYS
    along: Sequence[str] = ("input_ids", "attention_mask", "position_ids", "labels", "shift_labels")

    def __post_init__(self):
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate is {self.rate}: a share of the tokens lies from 0 to below 1.")
        if unknown := set(self.ways) - set(WAYS):
            raise ValueError(f"ways has {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}.")

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        batch = dict(self.collator(items))
        ids = batch["input_ids"]
        draws = torch.rand(ids.shape)
        touched = self.touchable(batch) & (draws < self.rate)
        part = (draws * len(self.ways) / self.rate).long() if self.rate else torch.zeros_like(ids)
        chosen = {way: touched & (part == number) for number, way in enumerate(self.ways)}
        if "replace" in chosen:
            batch["input_ids"] = torch.where(chosen["replace"], self.draw(ids.shape), ids)
        counts = torch.ones_like(ids)
        counts[chosen.get("delete", slice(0))] = 0
        counts[chosen.get("insert", slice(0))] = 2
        return batch if (counts == 1).all() else self.moved(batch, counts)

    def draw(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.as_tensor(self.vocabulary)[torch.randint(len(self.vocabulary), shape)]

    def touchable(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """[batch, length] where tokens may be touched."""
        ids = batch["input_ids"]
        free = ~torch.isin(ids, torch.as_tensor(self.keep, dtype=ids.dtype)) & batch["attention_mask"].bool()
        if "position_ids" in batch:
            free &= batch["position_ids"] > 0
        if "labels" in self.along and "labels" in batch and "shift_labels" not in batch:
            free &= batch["labels"] == -100
        return free

    def moved(self, batch: dict[str, torch.Tensor], counts: torch.Tensor) -> dict[str, torch.Tensor]:
        """The batch with each token `counts` [batch, length] times, of which the second is the inserted one."""
        columns = [name for name in self.along if name in batch]
        rows = [self.moved_row({name: batch[name][row] for name in columns}, times) for row, times in enumerate(counts)]
        return batch | {name: torch.stack([row[name] for row in rows]) for name in columns}

    def moved_row(self, row: dict[str, torch.Tensor], counts: torch.Tensor) -> dict[str, torch.Tensor]:
        length = len(counts)
        source = torch.arange(length).repeat_interleave(counts)[:length]
        inserted = source.diff(prepend=torch.tensor([-1])) == 0
        told = INSERTED | {"input_ids": self.draw((len(source),))}
        moved = {name: torch.where(inserted, told[name], values[source]) for name, values in row.items()}
        if "position_ids" in moved:
            moved["position_ids"] = places_since(moved["position_ids"] == 0)
        more = length - len(source)
        return {name: F.pad(values, (0, more), value=FILLERS[name]) for name, values in moved.items()}


def places_since(begins: torch.Tensor) -> torch.Tensor:
    """[length] how many places after the last beginning each is."""
    places = torch.arange(len(begins))
    return places - (places * begins).cummax(0).values
