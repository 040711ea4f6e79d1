import functools

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from ..ops.attention_kernels import fused, written_out
from ..ops.band import Band
from ..ops.banded_attention import banded_attention
from .mixer import Mixer
from .record import AttentionWeights, CrossAttentionWeights


class ChosenKernel(nn.Module):
    """The kernel that the user chose, called as transformers' own models call it: query [batch, heads, queries, dim]
    -> ([batch, queries, heads, dim], weights or None).

    A module of its own, whose `forward` names that call: an engine that keeps keys and values itself (vLLM) looks for
    it there, and puts its own attention in the place of each. What the engine answers may have lost the shape.
    """

    def __init__(self, mixer: Mixer):
        super().__init__()
        for name in ("config", "layer_idx", "is_causal", "num_key_value_groups", "sliding_window"):
            setattr(self, name, getattr(mixer, name))
        self.scaling, self.dropout = mixer.scaling, mixer.attention_dropout

    def forward(self, query, key, value, attention_mask, **kwargs):
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return output.reshape(query.shape[0], query.shape[2], -1, value.shape[-1]), weights


class Attention(Mixer):
    """softmax(q k^T / sqrt(dim) + bias) v over what the mask shows; groups of query heads may share a key and value
    head (Vaswani et al., 2017; multi-query: arXiv:1911.02150; grouped-query: arXiv:2305.13245)."""

    is_causal = True
    weights_class = AttentionWeights

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.config = config
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        num_key_value_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // num_key_value_heads
        self.scaling = getattr(config, "attention_scaling", None) or self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        sizes = {"q_proj": config.num_attention_heads, "k_proj": num_key_value_heads, "v_proj": num_key_value_heads}
        for name, heads in sizes.items():
            setattr(self, name, nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.attention_bias))
        width = config.num_attention_heads * self.head_dim
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        self.weights, self.attention = self.weights_class(), ChosenKernel(self)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple | None = None,
        past_key_values: Cache | None = None,
        layer_idx: int = 0,
        key_positions: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (proj(hidden_states).view(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        query, key = position_embeddings.rotate(query, key)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [batch, heads, length, dim]
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, layer_idx)
        kernel = functools.partial(self.attend, **kwargs)
        return self.answer(*position_embeddings.attend(kernel, query, key, value, attention_mask, key_positions))

    def answer(self, output: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        if weights is not None:
            self.weights(weights)
        return self.o_proj(output.flatten(-2))

    def attend(self, query, key, value, attention_mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.attention(query, key, value, attention_mask, **kwargs)

    def block_options(self) -> dict:
        """How an op that attends in blocks is called: by the kernel that the user chose."""
        dropout = self.attention_dropout if self.training else 0.0
        kernel = written_out if self.config._attn_implementation == "eager" else fused
        return {"scale": self.scaling, "dropout": dropout, "kernel": kernel}


class SlidingAttention(Attention):
    """Attention to the last `sliding_window` tokens. Where the mask is a band, as it is for texts longer than that of
    which nothing is cached, only those are compared."""

    def attend(self, query, key, value, attention_mask, **kwargs):
        if not isinstance(attention_mask, Band):
            return super().attend(query, key, value, attention_mask, **kwargs)
        tokens = (x.transpose(1, 2) for x in (query, key, value))
        return banded_attention(*tokens, attention_mask, **self.block_options())[0], None


class BidirectionalAttention(Attention):
    is_causal = False


class CrossAttention(Attention):
    """Attention to the encoder's answer; its keys and values are made once, and kept while `cross_cache` lives."""

    is_causal = False
    weights_class = CrossAttentionWeights

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.sliding_window = self.attention.sliding_window = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cross_cache: EncoderDecoderCache | None = None,
        layer_idx: int = 0,
        **kwargs,
    ) -> torch.Tensor:
        query = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if cross_cache is not None and cross_cache.is_updated.get(layer_idx):
            held = cross_cache.cross_attention_cache.layers[layer_idx]
            return self.answer(*self.attend(query, held.keys, held.values, encoder_attention_mask))
        key, value = (
            projection(encoder_hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.k_proj, self.v_proj)
        )
        if cross_cache is not None:
            key, value = cross_cache.cross_attention_cache.update(key, value, layer_idx)
            cross_cache.is_updated[layer_idx] = True
        return self.answer(*self.attend(query, key, value, encoder_attention_mask))
