import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .mixer import Mixer
from .record import AttentionWeights


class Attention(Mixer):
    """softmax(q k^T / sqrt(dim) + bias) v over what the mask shows; groups of query heads may share a key and value
    head (Vaswani et al., 2017; multi-query: arXiv:1911.02150; grouped-query: arXiv:2305.13245)."""

    is_causal = True

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.config = config
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        num_key_value_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // num_key_value_heads
        self.attention_dropout = config.attention_dropout
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        sizes = {"q_proj": config.num_attention_heads, "k_proj": num_key_value_heads, "v_proj": num_key_value_heads}
        for name, heads in sizes.items():
            setattr(self, name, nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.attention_bias))
        width = config.num_attention_heads * self.head_dim
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        self.weights = AttentionWeights()

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
        pieces = [
            self.attend(query[:, :, rows], key, value, mask, **kwargs)
            for rows, mask in position_embeddings.blocks(attention_mask, query.shape[2], key_positions)
        ]
        outputs, weights = zip(*pieces, strict=True)
        if weights[0] is not None:
            self.weights(weights[0] if len(weights) == 1 else torch.cat(weights, dim=2))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return self.o_proj(output.flatten(-2))

    def attend(self, query, key, value, attention_mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """([batch, queries, heads, dim], weights or None) by the kernel that the user chose."""
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.head_dim**-0.5,
            sliding_window=self.sliding_window,
            **kwargs,
        )


class BidirectionalAttention(Attention):
    is_causal = False
