"""Items of a row as patches, side by side: a grid over places that a call may enter in the middle of a patch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class PatchRows(NamedTuple):
    """Rows [rows, length, ...], of which each goes on with a patch of `size` where earlier calls left it."""

    size: int
    length: int
    late: torch.Tensor | None  # [rows] items of its first patch that earlier calls read; None in the first call
    lengths: torch.Tensor | None  # [rows] items that are there; None where all are
    mask: torch.Tensor | None  # what items of a patch see of it, as attention takes it

    @property
    def step(self) -> bool:
        return self.late is not None and self.length == 1

    def lay(self, rows: torch.Tensor, held: torch.Tensor | None) -> torch.Tensor:
        """[rows, length, ...] -> [rows, patches, size, ...], after what is `held` [rows, size, ...] of the first; None
        for anything, which is also past the end of a row."""
        size = self.size
        if self.late is None:
            missing = -self.length % size
            whole = F.pad(rows, (0, 0) * (rows.ndim - 2) + (0, missing)) if missing else rows  # padding by none copies
            return whole.unflatten(1, (-1, size))
        slots = size if self.step else -(-(size - 1 + self.length) // size) * size
        slot = torch.arange(slots, device=rows.device)
        source = (slot - self.late[:, None]).clamp(0, self.length - 1)
        if held is None:
            return taken(rows, source).unflatten(1, (-1, size))
        if self.step:
            new = (slot == self.late[:, None]).view(-1, size, *[1] * (rows.ndim - 2))
            return torch.where(new, rows, held.to(rows.dtype))[:, None]
        source = torch.where(slot < self.late[:, None], slot, size + source)
        return taken(torch.cat((held.to(rows.dtype), rows), dim=1), source).unflatten(1, (-1, size))

    def back(self, patches: torch.Tensor) -> torch.Tensor:
        """[rows, patches, size, ...] -> [rows, length, ...]"""
        patches = patches.flatten(1, 2)
        if self.late is None:
            return patches[:, : self.length]
        return taken(patches, self.late[:, None] + torch.arange(self.length, device=patches.device))

    def last(self, patches: torch.Tensor) -> torch.Tensor:
        """[rows, patches, size, ...] -> [rows, size, ...], what the next call goes on with."""
        if self.step:
            return patches[:, 0]
        end = self.length if self.lengths is None else self.lengths
        end = end if self.late is None else self.late + end
        if isinstance(end, int):
            return patches[:, min(end // self.size, patches.shape[1] - 1)].clone()  # without the others
        number = (end // self.size).clamp(max=patches.shape[1] - 1)
        return taken(patches, number[:, None])[:, 0]


def taken(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """rows [rows, length, ...], index [rows, taken] -> [rows, taken, ...]"""
    start = torch.arange(rows.shape[0], device=rows.device)[:, None] * rows.shape[1]
    found = rows.flatten(0, 1).index_select(0, (start + index).flatten())
    return found.view(*index.shape, *rows.shape[2:])
