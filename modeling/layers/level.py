"""Levels of a hierarchy: what a call reads at each, and what its layers remember of what came before.

At every level texts are left-aligned rows of items (tokens, groups of them, chunks), one for each document, so that a
grid over items counts those that are there, and each row has had as many before as it had.
"""

import functools
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache

from ..ops.token_choice import ChosenRows
from .cache import RecurrentCacheLayer
from .chosen_cache import FirstKeys, RememberedKeys


class Level(NamedTuple):
    """The items that a call reads at one level."""

    real: torch.Tensor | None  # [rows, longest] whether a place of a row holds an item; None where all do
    place: torch.Tensor  # [rows or 1, longest] of each item in its document, those of earlier calls counted
    batch_row: torch.Tensor  # [rows] the row of the batch that each is of
    last: torch.Tensor | None  # [rows] whether it is the last of its row of the batch; None where all are
    before: torch.Tensor | None  # [batch] items of earlier calls; None in the first
    batch: int
    fixed: bool  # whether no shape may rest on values: rows are then those of the batch

    @property
    def whole(self) -> bool:
        """Whether the rows are those of the batch."""
        return self.last is None and len(self.batch_row) == self.batch

    @property
    def count(self) -> torch.Tensor:
        """[batch] the items that each row of the batch has had after this call."""
        longest, row, last = self.place.shape[1], self.batch_row, self.last
        new = torch.full_like(row, longest) if self.real is None else self.real.sum(1)
        if last is not None:
            row, new = row[last], new[last]
        before = row.new_zeros(self.batch) if self.before is None else self.before
        return before + new if self.whole else before.index_add(0, row, new)

    def inside(self, rows: ChosenRows, before: torch.Tensor | None) -> "Level":
        """The level of the items that these items make: `rows` of them, after `before` [batch] of earlier calls."""
        last = None if self.last is None else self.last[rows.batch_row]
        return level_of(rows, self.batch_row[rows.batch_row], last, before, self.batch, self.fixed)

    def gather(self, held: torch.Tensor) -> torch.Tensor:
        """[batch, ...] -> [rows, ...]"""
        return held if self.whole else held.index_select(0, self.batch_row)

    def scatter(self, held: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        """`held` [batch, ...], zeros if None, with what `new` [rows, ...] says of the last document of each row."""
        if self.whole:
            return new
        row, last = self.batch_row, self.last
        if last is not None:
            row, new = row[last], new[last]
        held = new.new_zeros(self.batch, *new.shape[1:]) if held is None else held
        return held.index_copy(0, row, new.to(held.dtype))


def level_of(rows: ChosenRows, batch_row, last, before: torch.Tensor | None, batch: int, fixed: bool) -> Level:
    place = torch.arange(rows.index.shape[1], device=batch_row.device)[None]
    if before is not None:
        place = place + before[batch_row, None]
    return Level(rows.real, place, batch_row, last, before, batch, fixed)


class RowStates:
    """The cache layer of a recurrence as the rows of a level see it: `read`, `write` and `states` as of a
    `RecurrentCacheLayer`. Tokens are counted by the model, at all levels alike. What else has a state there tells its
    names apart by a prefix."""

    def __init__(self, held: RecurrentCacheLayer, level: Level, prefix: str = ""):
        self.held, self.level, self.prefix = held, level, prefix

    @property
    def is_initialized(self) -> bool:
        return self.held.is_initialized

    @property
    def states(self) -> dict[str, torch.Tensor]:
        return {name: self.level.gather(state) for name, state in self.held.states.items()}

    def read(self, name: str) -> torch.Tensor | None:
        state = self.held.read(self.prefix + name)
        return None if state is None else self.level.gather(state)

    def write(self, new_tokens: int, **states: torch.Tensor) -> None:
        held = {self.prefix + name: state for name, state in states.items()}
        self.held.write(0, **{name: self.level.scatter(self.held.read(name), new) for name, new in held.items()})


class LevelCache:
    """What the layers of a level take for the cache: keys and values by `update`, states by `layers[layer_idx]`."""

    def __init__(self, cache: Cache, level: Level):
        self.held, self.level, self.count = cache.layers, level, level.count
        self.first = level.before is None
        row, last = level.batch_row, level.last
        place = level.place.expand(row.shape[0], -1)
        if level.real is not None:
            place = torch.where(level.real, place, -1)
        if self.first:
            row, place = (row, place) if last is None else (row[last], place[last])
            self.keys = functools.partial(FirstKeys, rows=row, place=place, shown=last)
            return
        self.shown = None if level.fixed else int(self.count[row].max())
        self.keys = functools.partial(RememberedKeys, rows=row, place=place, shown=self.shown)

    @property
    def layers(self) -> "LevelCache":
        return self

    def __getitem__(self, layer_idx: int) -> RowStates:
        return RowStates(self.held[layer_idx], self.level)

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys(self.held[layer_idx], count=self.count.clone()).update(key, value)

    def visible(self, layer_idx: int) -> torch.Tensor | None:
        """[rows, 1, items, keys], which of the keys that `update` gives an item sees: those up to itself. None where it
        is all."""
        place, rows = self.level.place, self.level.batch_row
        if self.shown is None:
            keys = self.held[layer_idx].max_cache_len + 1
        elif place.shape[1] == 1 and int(self.count[rows].min()) == self.shown:
            return None
        else:
            keys = self.shown
        return (torch.arange(keys, device=place.device) <= place[..., None])[:, None]
