import functools
from collections import OrderedDict

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..ops.latent_attention import absorbed_latent_attention, absorbing_is_less_work, expanded_latent_attention
from .attention import Attention, AttentionKernel
from .derived import Derived
from .mixer import Mixer
from .norm import RMSNorm
from .record import AttentionWeights

LATENT_NORM_EPS = 1e-6  # of every checkpoint, whatever its other norms have


class LatentExpansion(Derived):
    """Keys and values of all heads, made of the latent of a token."""

    def __init__(self, rank: int, num_heads: int, nope: int, dim: int):
        super().__init__()
        self.sizes = nope, dim
        self.kv_b_proj = nn.Linear(rank, num_heads * (nope + dim), bias=False)

    def forward(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """latent [batch, length, rank] -> key [batch, length, heads, nope], value [batch, length, heads, dim]"""
        return self.kv_b_proj(latent).unflatten(-1, (-1, sum(self.sizes))).split(self.sizes, dim=-1)

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """([heads, nope, rank], [heads, dim, rank]): what `forward` multiplies by."""
        weight = self.kv_b_proj.weight
        if type(self.kv_b_proj) is not nn.Linear or type(weight) not in (torch.Tensor, nn.Parameter):
            weight = self.derive("weight", self.found_out)
        return weight.unflatten(0, (-1, sum(self.sizes))).split(self.sizes, dim=1)

    def found_out(self) -> torch.Tensor:
        """The matrix of whatever stands for the projection: an adapter, a shard, small integers."""
        like = next(p for p in self.kv_b_proj.parameters() if p.is_floating_point())
        return self.kv_b_proj(torch.eye(self.rank, device=like.device, dtype=like.dtype)).T

    @property
    def rank(self) -> int:
        return self.kv_b_proj.in_features


class LatentAttention(Mixer):
    """Multi-head latent attention (DeepSeek-AI, 2024, arXiv:2405.04434, section 2.1): keys and values of all heads are
    made of one latent vector per token, and positions turn a part of the queries and one key that all heads share.

    The cache holds the latent, after its norm, and the rotated key. A pass over many tokens makes the keys and values
    of all heads; a few tokens after a text ask the latents themselves (`ops/latent_attention.py`).
    """

    is_causal = True
    num_key_value_groups = 1
    sliding_window = None
    attend, answer = Attention.attend, Attention.answer

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.config = config
        self.attention_dropout = config.attention_dropout
        self.nope, self.rope, self.dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.scaling = config.attention_scaling
        size, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        biased = config.attention_bias
        asked = heads * (self.nope + self.rope)
        if config.q_lora_rank is None:
            steps = {"q_proj": nn.Linear(size, asked, bias=False)}
        else:
            steps = {
                "q_a_proj": nn.Linear(size, config.q_lora_rank, bias=biased),
                "q_a_norm": RMSNorm(config.q_lora_rank, LATENT_NORM_EPS),
                "q_b_proj": nn.Linear(config.q_lora_rank, asked, bias=False),
            }
        self.query = nn.Sequential(OrderedDict(steps))
        self.kv_a_proj = nn.Linear(size, rank + self.rope, bias=biased)
        self.kv_a_norm = RMSNorm(rank, LATENT_NORM_EPS)
        self.expansion = LatentExpansion(rank, heads, self.nope, self.dim)
        self.o_proj = nn.Linear(heads * self.dim, size, bias=biased)
        self.weights, self.attention = AttentionWeights(), AttentionKernel(self)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple | None = None,
        past_key_values: Cache | None = None,
        layer_idx: int = 0,
        **kwargs,
    ) -> torch.Tensor:
        query = self.query(hidden_states).unflatten(-1, (-1, self.nope + self.rope))
        latent, key_rope = self.kv_a_proj(hidden_states).split((self.expansion.rank, self.rope), dim=-1)
        latent, (nope, rope) = self.kv_a_norm(latent), query.split((self.nope, self.rope), dim=-1)
        rope, key_rope = position_embeddings.rotate(rope, key_rope[:, :, None])
        query, key_rope = torch.cat((nope, rope), dim=-1), key_rope[:, :, 0]
        if past_key_values is not None:
            held = past_key_values.update(latent[:, None], key_rope[:, None], layer_idx)
            latent, key_rope = (x[:, 0] for x in held)
        if self.absorbs(query, latent, attention_mask):
            matrices = self.expansion.matrices()
            return self.answer(
                *absorbed_latent_attention(query, latent, key_rope, *matrices, attention_mask, self.scaling)
            )
        kernel = functools.partial(self.attend, **kwargs)
        expanded = self.expansion(latent)
        return self.answer(*expanded_latent_attention(kernel, query, *expanded, key_rope, attention_mask))

    def absorbs(self, query: torch.Tensor, latent: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
        """Whether these queries ask the latents themselves: where it is less work, by a mask that is known here."""
        known = attention_mask is None or isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4
        less = absorbing_is_less_work(query.shape[1], latent.shape[1], self.nope, self.dim)
        return less and known and not self.training
