"""Cross-attention to a document in segments, and what it remembers of it."""

from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, EncoderDecoderCache

from ..ops.chosen_blocks import Choice, best_blocks, rows_at
from ..ops.documents import Unpacked
from ..ops.hierarchical_attention import Source, dense_weights_by_segment, hierarchical_attention, of_rows
from .attention import CrossAttention
from .cache import RecurrentCacheLayer
from .record import weights_asked
from .segments import Segmentation


class SourceCacheLayer(RecurrentCacheLayer):
    """Keys and values of documents, which stay as they are, and `row` [rows], who asks which: rows that are put in
    another order, or become several, ask what they asked, and nothing as long as a document is copied."""

    def change(self, each) -> None:
        self.past.clear()
        self.states["row"] = each(self.states["row"])


DYNAMIC_LAYER_TYPE_MAPPING["hierarchical_cross_attention"] = SourceCacheLayer


class SourceLayout(NamedTuple):
    """Where in a batch of sources [batch, length] the tokens of each segment are, and who asks."""

    length: int
    token: torch.Tensor  # [documents, segments, longest] index of each in the flattened batch; any where there is none
    sizes: torch.Tensor  # [documents, segments] the tokens of each, 0 where there is none
    row: torch.Tensor  # [rows] the document that each row of queries asks
    asking: Unpacked | None  # packed answers as rows of their own; None where rows are what they are


def lay_out(text: Segmentation, batch: int, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(token, sizes) of a `SourceLayout`, of a batch in segments of level 0."""
    members, leaders = text.members(0), text.leaders(0)
    token = members.unpack(torch.arange(batch * length, device=device).view(batch, length))
    sizes = torch.full_like(token[:, 0], token.shape[1]) if members.real is None else members.real.sum(1)
    number = torch.arange(len(token), device=device)[:, None]
    number = leaders.unpack(text.first(0).repack_into(number.new_zeros(batch, length), number))
    sizes = sizes[number]
    return token[number], sizes if leaders.real is None else sizes * leaders.real


class HierarchicalCrossAttention(CrossAttention):
    """Attention to the tokens of the `num_chosen_segments` segments of the source that suit a query best, by
    projections of its own for queries and leaders of segments (`ops/hierarchical_attention.py`)."""

    unquantized = ("segment_q_proj", "segment_k_proj")

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.count = config.num_chosen_segments
        for name, like in (("segment_q_proj", self.q_proj), ("segment_k_proj", self.k_proj)):
            setattr(self, name, nn.Linear(config.hidden_size, like.out_features, bias=config.attention_bias))

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        source_layout: SourceLayout | None = None,
        cross_cache: EncoderDecoderCache | None = None,
        layer_idx: int = 0,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """encoder_hidden_states: [batch, length, size] of sources, `source_layout` says of which make; where
        `cross_cache` holds their keys, it is not looked at. What is not packed may be several rows for each source."""
        projected = (projection(hidden_states) for projection in (self.q_proj, self.segment_q_proj))
        query, asking = (x.unflatten(-1, (-1, self.head_dim)) for x in projected)
        source, token = self.source(encoder_hidden_states, source_layout, cross_cache, layer_idx)
        packed = None if source_layout is None else source_layout.asking
        if packed is not None:
            query, asking = packed.unpack(query), packed.unpack(asking)
        query, asking = query.transpose(1, 2), asking.transpose(1, 2)
        weights, told = None, {"scale": self.scaling, "choose": self.choose}
        if weights_asked(self.config, output_attentions):
            weights = dense_weights_by_segment(query, asking, source, self.count, **told)
            weights = by_column(weights, of_rows(token, source.row), encoder_hidden_states.shape[1])
        dropout = self.attention_dropout if self.training else 0.0
        output = hierarchical_attention(query, asking, source, self.count, dropout=dropout, **told).transpose(1, 2)
        if packed is not None:
            shape = hidden_states.shape[:2]
            output = packed.repack(output, *shape)
            weights = None if weights is None else packed.repack(weights.transpose(1, 2), *shape).transpose(1, 2)
        return self.answer(output, weights)

    def choose(self, scores: torch.Tensor, count: int) -> Choice:
        return best_blocks(scores, count)

    def source(
        self, encoded: torch.Tensor, layout: SourceLayout | None, cross_cache, layer_idx: int
    ) -> tuple[Source, torch.Tensor]:
        """The keys and values of the sources, and the column of each token, made once for as long as a cache lives."""
        if cross_cache is None:
            return self.read(encoded, layout)
        layers = cross_cache.cross_attention_cache.layers
        if not cross_cache.is_updated.get(layer_idx):
            source, column = self.read(encoded, layout)
            layers[layer_idx : layer_idx + 1] = [SourceCacheLayer()]
            own = {"row": source.row.clone(), "sizes": source.sizes.clone()}  # layers may be kept apart
            layers[layer_idx].write(encoded.shape[1], **(source._asdict() | own), column=column)
            cross_cache.is_updated[layer_idx] = True
        held = layers[layer_idx].states
        return Source(*(held[name] for name in Source._fields)), held["column"]

    def read(self, encoded: torch.Tensor, layout: SourceLayout) -> tuple[Source, torch.Tensor]:
        projected = (projection(encoded).flatten(0, 1) for projection in (self.k_proj, self.v_proj))
        key, value = (rows_at(x, layout.token) for x in projected)
        leading = self.segment_k_proj(rows_at(encoded.flatten(0, 1), layout.token[..., 0]))
        key, value, leading = (x.unflatten(-1, (-1, self.head_dim)) for x in (key, value, leading))
        key, value = (x.permute(0, 3, 1, 2, 4).contiguous() for x in (key, value))
        source = Source(key, value, leading.transpose(1, 2).contiguous(), layout.sizes, layout.row)
        return source, layout.token % layout.length


def by_column(weights: torch.Tensor, column: torch.Tensor, length: int) -> torch.Tensor:
    """weights [rows, heads, queries, segments, longest] of the tokens in the columns [rows, segments, longest] ->
    [rows, heads, queries, length]."""
    weights = weights.flatten(-2)
    column = column.flatten(1)[:, None, None].expand_as(weights)
    return weights.new_zeros(*weights.shape[:3], length).scatter_add(-1, column, weights)
