"""Layers that work at the levels of a hierarchy of segments (`segments.py`), and what they are told of it.

The stream holds the tokens. A segment is spoken for by its first token, its leader, which is also a member of the
segment above. A layer reads the members of each segment of its level as a text of their own, or lets some tokens ask
the members of their segment.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ..ops.documents import EvenlyUnpacked, Unpacked
from .positions import NoPositions, Plain
from .view import View

Rows = Unpacked | EvenlyUnpacked


class MemberMask(NamedTuple):
    """What layers that read segments are told in the place of a mask: whose members are whose, at which level, and
    the mask in segments."""

    members: Rows
    mask: torch.Tensor | None
    level: int


class AskingMask(NamedTuple):
    """The same of layers that ask segments: which tokens ask, a row per segment, and the members whom they ask."""

    asking: Rows
    members: Rows
    mask: torch.Tensor | None


class LevelTables(NamedTuple):
    """A vector per place in a segment, of each level but the first, where there are such: parameters, so that
    checkpointed layers find them in backward."""

    tables: dict[int, torch.Tensor]

    rotate = Plain.rotate
    attend = Plain.attend

    def placed(self, rows: torch.Tensor, level: int) -> torch.Tensor:
        """Members [segments, places, size] with the vectors of their places. Tokens have theirs from the beginning."""
        table = self.tables.get(level)
        return rows if table is None else rows + table[: rows.shape[1]]


class LevelPositions(NoPositions):
    """x + a learned vector per place in the segment of level 0; layers of other levels add theirs to the leaders."""

    def __init__(self, config):
        super().__init__(config)
        self.levels = nn.ModuleList(nn.Embedding(length, config.hidden_size) for length in config.level_lengths)

    def forward(self, hidden_states, position_ids):
        tables = {level: table.weight for level, table in enumerate(self.levels) if level}
        return hidden_states + self.levels[0](position_ids), LevelTables(tables)


class NoLevelPositions(NoPositions):
    """Recurrences tell places apart by themselves."""

    def forward(self, hidden_states, position_ids):
        return hidden_states, LevelTables({})


class MemberView(View):
    """A layer sees each segment of its level as a text of its own, [segments, longest, size]: of tokens, or of leaders
    with the vector of their place. Other tokens pass it by."""

    def forward(
        self,
        stream: torch.Tensor,
        inside: Callable[..., torch.Tensor],
        attention_mask: MemberMask,
        position_embeddings: LevelTables,
        **context,
    ) -> torch.Tensor:
        members, mask, level = attention_mask
        told = {"attention_mask": mask, "position_embeddings": position_embeddings, "documents": members.real}
        rows = position_embeddings.placed(members.unpack(stream), level)
        return members.repack_into(stream, inside(rows, **context | told))


class AskingView(View):
    """A layer sees the tokens of each segment that ask, and as its `encoder_hidden_states` the members."""

    def forward(
        self, stream: torch.Tensor, inside: Callable[..., torch.Tensor], attention_mask: AskingMask, **context
    ) -> torch.Tensor:
        asking, members, mask = attention_mask
        told = {"encoder_hidden_states": members.unpack(stream), "encoder_attention_mask": mask}
        told["documents"] = asking.real
        return asking.repack_into(stream, inside(asking.unpack(stream), **context | told))
