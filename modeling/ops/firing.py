"""Which items of a level make an item of the next, and which of those each of them uses.

An item that fires makes one of the next level, of what was read so far; every item uses the last that fired at or
before it. In a call that goes on with a text, this may be one that an earlier call made.
"""

from typing import NamedTuple

import torch

from .token_choice import ChosenRows, all_rows, rows_of


class Fired(NamedTuple):
    """Items [rows, length] of which some fired: these as rows of their own, one for each row that has any."""

    rows: ChosenRows
    used: torch.Tensor  # [rows, length] which of this call's items each one uses, from 0; -1 for one of an earlier call

    def spread(
        self, made: torch.Tensor | None, held: torch.Tensor | None = None, part: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[rows, length, ...], what each item uses.

        made: [fired rows, fired, ...] of the items of this call, None where there are none; held: [rows, ...] of the
        last of earlier calls, None where there were none. part: [rows or 1, length], where both are of several parts
        [..., parts, size], the one that each item uses.
        """
        rows, length = self.used.shape
        row = torch.arange(rows, device=self.used.device)[:, None]
        tables, index = [], self.used.clamp(min=0)
        if made is not None:
            start = torch.zeros_like(row[:, 0]).index_copy(0, self.rows.batch_row, row[: len(made), 0] * made.shape[1])
            tables, index = [made.flatten(0, 1)], start[:, None] + index
        if held is not None:
            of_earlier = row + len(tables[0]) if tables else row
            index = torch.where(self.used < 0, of_earlier, index) if tables else of_earlier.expand_as(index)
            tables.append(held)
        table = tables[0] if len(tables) == 1 else torch.cat(tables)
        if part is not None:
            table, index = table.flatten(0, 1), index * table.shape[1] + part
        return table.index_select(0, index.flatten()).view(rows, length, *table.shape[1:])

    def last(self, made: torch.Tensor | None, held: torch.Tensor | None = None) -> torch.Tensor:
        """[rows, ...], what comes after the last item of each row begins with: `held` of the next call."""
        return self._replace(used=self.used[:, -1:]).spread(made, held)[:, 0]


def fired_rows(fires: torch.Tensor, most: int | None = None) -> Fired:
    """Items [rows, length] (bool) that fire. With `most`, how many of a row can, no shape rests on values."""
    rows = rows_of(fires) if most is None else all_rows(fires, most)
    return Fired(rows, fires.cumsum(1) - 1)


def last_of(items: torch.Tensor, count: int, real: torch.Tensor | None) -> torch.Tensor:
    """The last `count` of items [rows, count + longest, size], where rows go on to where `real` says."""
    if real is None:
        return items[:, -count:].clone()  # without the others
    index = real.sum(1, keepdim=True) + torch.arange(count, device=items.device)
    return items.gather(1, index[..., None].expand(-1, -1, items.shape[-1]))
