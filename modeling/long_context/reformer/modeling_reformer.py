"""Reformer (Kitaev et al., 2020, arXiv:2001.04451): attention to what hashes to the same bucket."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils.output_capturing import OutputRecorder

from ...layers.bucketed import attend_in_buckets
from ...layers.feed_forward import ChunkedMLP
from ...layers.mixer import Mixer
from ...layers.positions import AxialPositions
from ...layers.record import AttentionWeights, HiddenStates, weights_asked
from ...layers.reversible import Choices, Reversible
from ...ops.bucketed_attention import bucketed_weights
from ...ops.precision import without_autocast
from ...ops.sorted_attention import sorted_attention, sorted_weights
from ...skeleton.backbone import Backbone
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.config import ArchConfig
from ...skeleton.heads import CausalLM, MaskedLM
from ...skeleton.laboratory import POSITIONS
from .configuration_reformer import ArchReformerConfig


class BlockAttention(Mixer):
    """What the two kinds of layers share: tokens see blocks of those that share a bucket with them."""

    sees_itself = True

    def __init__(self, config: ArchReformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.config, self.head_dim = config, config.head_dim
        self.num_heads, self.attention_dropout = config.num_attention_heads, config.attention_dropout
        self.num_buckets, self.block = 1, config.local_attn_chunk_length
        self.attend = {"ranked": self.among_ranked, "sorted": self.among_sorted}[config.bucketing]
        width = config.num_attention_heads * config.head_dim
        for name in self.projections:
            setattr(self, name, nn.Linear(config.hidden_size, width, bias=config.attention_bias))
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        self.weights = AttentionWeights()

    def tokens(self, hidden_states: torch.Tensor, choices: Choices) -> tuple[torch.Tensor, ...]:
        """query, key, value [batch, length, heads, dim] and buckets [batch, length, heads or 1, rounds]."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple | None = None,
        past_key_values: Cache | None = None,
        layer_idx: int = 0,
        choices: Choices | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> torch.Tensor:
        tokens = self.tokens(hidden_states, choices or Choices())
        options = {"num_buckets": self.num_buckets, "block": self.block, "sees_itself": self.sees_itself}
        options |= {"documents": attention_mask}
        memory = self.memory(past_key_values, layer_idx)
        output = self.attend(memory, *tokens, weights_asked(self.config, output_attentions), **options)
        return self.o_proj(output.flatten(-2))

    def among_ranked(self, memory, query, key, value, buckets, output_attentions: bool, **options) -> torch.Tensor:
        weights = None
        if output_attentions and (memory is None or not memory.is_initialized):
            weights = self.weights(bucketed_weights(query, key, buckets, **options))
        options |= {"dropout": self.attention_dropout if self.training else 0.0}
        output, states = attend_in_buckets(memory, query, key, value, buckets, **options)
        if memory is not None:
            memory.write(query.shape[1], **states)
        return output if weights is None else weigh_values(weights, value)

    def among_sorted(self, memory, query, key, value, buckets, output_attentions: bool, **options) -> torch.Tensor:
        if memory is not None:
            raise ValueError(
                "Tokens that are sorted by bucket see the whole document, of which nothing can be remembered: call "
                "with use_cache=False, or take a causal model with bucketing 'ranked'."
            )
        options |= {"causal": self.config.direction == "causal"}
        if output_attentions:
            return weigh_values(self.weights(sorted_weights(query, key, buckets, **options)), value)
        dropout = self.attention_dropout if self.training else 0.0
        return sorted_attention(query, key, value, buckets, dropout=dropout, **options)


def weigh_values(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The answer [batch, length, heads, dim] where weights of all pairs were asked for."""
    return torch.einsum("bhij,bjhd->bihd", weights, value)


class LocalAttention(BlockAttention):
    """Attention to the tokens of one's own block and the one before: those of a single bucket."""

    projections = ("q_proj", "k_proj", "v_proj")

    def tokens(self, hidden_states, choices):
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return query * self.head_dim**-0.5, key, value, torch.zeros_like(query[..., :1, :1], dtype=torch.long)


class LSHAttention(BlockAttention):
    """Attention to what hashes to the same bucket, in rounds; keys are the queries at length one (section 2).

    A bucket is the axis, or its opposite, that a random rotation brings a query closest to (Andoni et al., 2015,
    arXiv:1509.02897). The rotations stay as they were drawn, and are saved.
    """

    projections = ("qk_proj", "v_proj")
    sees_itself = False

    def __init__(self, config: ArchReformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.factors, self.block = config.bucket_factors, config.lsh_attn_chunk_length
        self.num_buckets = math.prod(self.factors)
        axes = sum(self.factors) // 2
        rotations = torch.empty(config.num_attention_heads, config.head_dim, config.num_hashes, axes)
        self.register_buffer("rotations", rotations.copy_(self.draw(rotations.shape)))

    def init_parameters(self, std: float) -> None:
        init.copy_(self.rotations, self.draw(self.rotations.shape))

    def draw(self, shape: torch.Size) -> torch.Tensor:
        """The same for all models of a shape, whatever seed their weights have."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.layer_idx), device="cpu")

    def tokens(self, hidden_states, choices):
        query, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)) for projection in (self.qk_proj, self.v_proj)
        )
        key = F.rms_norm(query, (self.head_dim,), eps=1e-6) * self.head_dim**-0.5
        return query, key, value, choices.first(lambda: self.choose(query.detach()))

    def choose(self, query: torch.Tensor) -> torch.Tensor:
        """The buckets [batch, length, heads, rounds] of queries [batch, length, heads, dim]."""
        wide = torch.promote_types(query.dtype, torch.float32)
        with without_autocast(query):
            turned = torch.einsum("blhd,hdra->blhra", query.to(wide), self.rotations.to(wide))
        buckets, number = 0, 1
        for factor, part in zip(self.factors, turned.split([n // 2 for n in self.factors], dim=-1), strict=True):
            (high, axis), (low, opposite) = part.max(-1), part.min(-1)
            buckets = buckets + number * torch.where(high >= -low, axis, opposite + factor // 2)
            number *= factor
        return buckets


class ArchReformerModel(Backbone):
    config: ArchReformerConfig
    mixers = {"local_attention": LocalAttention, "lsh_attention": LSHAttention}
    feed_forwards = Backbone.feed_forwards | {"dense": ChunkedMLP}
    residual = Reversible
    _can_record_outputs = Backbone._can_record_outputs | {"hidden_states": OutputRecorder(HiddenStates)}
    norm_class = nn.LayerNorm

    def __init__(self, config: ArchConfig):
        self.positions = (POSITIONS | {"axial": AxialPositions})[config.position_type]
        super().__init__(config)


class ArchReformerForCausalLM(CausalLM):
    config: ArchReformerConfig
    backbone = ArchReformerModel


class ArchReformerForMaskedLM(MaskedLM):
    config: ArchReformerConfig
    backbone = ArchReformerModel


class ArchReformerForSequenceClassification(SequenceClassification):
    config: ArchReformerConfig
    backbone = ArchReformerModel


class ArchReformerForTokenClassification(TokenClassification):
    config: ArchReformerConfig
    backbone = ArchReformerModel


class ArchReformerForQuestionAnswering(QuestionAnswering):
    config: ArchReformerConfig
    backbone = ArchReformerModel
