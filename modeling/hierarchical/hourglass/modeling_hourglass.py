"""Hourglass (Nawrot et al., 2021, arXiv:2110.13711): most layers see a text that groups of tokens have been made of.

The original shifts a text by shorten_factor - 1 before it is cut into groups. Here the same is said by where groups
end: at every place that is a multiple of the factor, so that a group is complete as soon as its last token is there.

Attention resampling stays within a group: what it was shortened to asks its own items, and items ask the answer to
their own group. The authors' trax code lets all items be seen that are not later. Those
of other groups are known to the layers on both sides already; within groups the cost does not grow with the text, and a
step needs no keys of earlier tokens.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ...layers.attention import Attention, BidirectionalAttention
from ...layers.feed_forward import MLP
from ...layers.level import Level, RowStates
from ...layers.positions import NoPositions, RotaryEmbedding
from ...layers.residual import PreNorm
from ...layers.window_attention import CausalWindowAttention
from ...ops.firing import Fired, last_of
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM, MaskedLM
from ...skeleton.hierarchy import Hierarchy, Resampling
from ...skeleton.laboratory import NORMS, POSITIONS
from .configuration_hourglass import ArchHourglassConfig


class LinearResampling(nn.Module):
    """A map of the items of a group, side by side, to one, and of its answer back to as many."""

    def __init__(self, size: int, factor: int):
        super().__init__()
        self.factor = factor
        self.shorten_proj, self.expand_proj = nn.Linear(factor * size, size), nn.Linear(size, factor * size)

    def shorten(self, groups: torch.Tensor) -> torch.Tensor:
        """[..., factor, size] -> [..., size]"""
        return self.shorten_proj(groups.flatten(-2))

    def expand(self, answer: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [..., factor, size]"""
        return self.expand_proj(answer).unflatten(-1, (self.factor, -1))


class AverageResampling(nn.Module):
    """The mean of a group, and its answer for each of them."""

    def __init__(self, size: int, factor: int):
        super().__init__()

    def shorten(self, groups: torch.Tensor) -> torch.Tensor:
        return groups.mean(-2)

    def expand(self, answer: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [..., 1, size], which is for all."""
        return answer[..., None, :]


class GroupAttention(nn.Module):
    """Attention of what a group was shortened to, to the group."""

    def __init__(self, config: ArchHourglassConfig):
        super().__init__()
        self.head_dim, width = config.head_dim, config.num_attention_heads * config.head_dim
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, width, bias=config.attention_bias))
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)

    def forward(self, items: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """items [rows, items, size], groups [rows, items, factor, size]"""
        query = self.q_proj(items).unflatten(-1, (-1, self.head_dim)) * self.head_dim**-0.5
        key, value = (proj(groups).unflatten(-1, (-1, self.head_dim)) for proj in (self.k_proj, self.v_proj))
        weights = (query[:, :, None] * key).sum(-1).softmax(2)
        return self.o_proj((weights[..., None] * value).sum(2).flatten(-2))


class ValueOfOne(nn.Module):
    """Attention to one item alone: its value, whatever the query."""

    def __init__(self, config: ArchHourglassConfig):
        super().__init__()
        width = config.num_attention_heads * config.head_dim
        self.v_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.v_proj(items))


RESAMPLINGS = {"linear": LinearResampling, "average": AverageResampling}
INNER_POSITIONS = {"rope": RotaryEmbedding, "learned": NoPositions}


class HourglassResampling(Resampling):
    """x' = shorten(groups of x), y = x + expand(answer to x'), both perhaps followed by a layer of attention."""

    def __init__(self, config: ArchHourglassConfig, level: int):
        super().__init__(config, level)
        self.factor, self.causal = config.shorten_factors[level], config.direction == "causal"
        self.pool = RESAMPLINGS[config.resampling_type](config.hidden_size, self.factor)
        self.attends = config.attention_resampling
        if self.attends:
            self.down_attention, self.down_feed_forward = GroupAttention(config), MLP(config, 0)
            self.up_attention, self.up_feed_forward = ValueOfOne(config), MLP(config, 0)

            def norm() -> nn.Module:
                return NORMS[config.norm_type](config.hidden_size, config.norm_eps)

            self.down = PreNorm(config, ("attention", "feed_forward"), norm)
            self.up = PreNorm(config, ("feed_forward",), norm)

    def most(self, length: int) -> int:
        return -(-length // self.factor)

    def fire(self, stream, level: Level, kept: RowStates | None):
        """Every `factor`-th item. With it, the stream and those that its first and last groups reach out to, zeros
        where there are none."""
        fires = level.place % self.factor == 0
        if level.real is not None:
            fires = fires & level.real
        if not self.causal:
            if level.real is not None:
                stream = stream * level.real[..., None]
            return fires.expand(stream.shape[:2]), F.pad(stream, (0, 0, 0, self.factor - 1))
        held = None if kept is None else kept.read("items")
        reach = self.factor - 1
        around = F.pad(stream, (0, 0, reach, 0)) if held is None else torch.cat((held.to(stream.dtype), stream), dim=1)
        if kept is not None:
            kept.write(0, items=last_of(around, reach, level.real))
        return fires.expand(stream.shape[:2]), around

    def shorten(self, stream, fired: Fired, around: torch.Tensor, level: Level, kept):
        row, place = fired.rows.index // stream.shape[1], fired.rows.index % stream.shape[1]
        first = row * around.shape[1] + place
        index = first[..., None] + torch.arange(self.factor, device=first.device)
        groups = around.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, -1)
        items = self.pool.shorten(groups)
        if not self.attends:
            return items
        attention = lambda hidden_states: self.down_attention(hidden_states, groups)  # noqa: E731
        return self.down(items, {"attention": attention, "feed_forward": self.down_feed_forward})

    def expand(self, stream, answer, fired: Fired, around, level: Level, kept: RowStates | None):
        made = None if answer is None else self.pool.expand(answer)
        if made is not None and self.attends:
            made = made + self.up_attention(answer)[..., None, :]
        held = None if kept is None else kept.read("answer")
        held = None if held is None else held.to(stream.dtype)
        parts = (held if made is None else made).shape[-2]
        stream = stream + fired.spread(made, held, level.place % parts)
        if kept is not None:
            kept.write(0, answer=fired.last(made, held))
        return self.up(stream, {"feed_forward": self.up_feed_forward}) if self.attends else stream


class ArchHourglassModel(Hierarchy):
    config: ArchHourglassConfig
    resampling = HourglassResampling
    mixers = {
        "ragged_attention": Attention,
        "causal_window_attention": CausalWindowAttention,
        "bidirectional_attention": BidirectionalAttention,
    }

    def __init__(self, config: ArchHourglassConfig):
        self.norm_class = NORMS[config.norm_type]
        self.positions = POSITIONS[config.position_type]
        super().__init__(config)

    def make_positions(self, level: int) -> nn.Module:
        return INNER_POSITIONS[self.config.position_type](self.config)


class ArchHourglassForCausalLM(CausalLM):
    config: ArchHourglassConfig
    backbone = ArchHourglassModel


class ArchHourglassForMaskedLM(MaskedLM):
    config: ArchHourglassConfig
    backbone = ArchHourglassModel


class ArchHourglassForSequenceClassification(SequenceClassification):
    config: ArchHourglassConfig
    backbone = ArchHourglassModel


class ArchHourglassForTokenClassification(TokenClassification):
    config: ArchHourglassConfig
    backbone = ArchHourglassModel


class ArchHourglassForQuestionAnswering(QuestionAnswering):
    config: ArchHourglassConfig
    backbone = ArchHourglassModel
