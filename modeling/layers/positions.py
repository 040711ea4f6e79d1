"""Where a token stands: added to the embeddings, or told to every layer as `position_embeddings`, or both or neither.

The slot is called as positions(hidden_states [batch, length, size], position_ids [batch or 1, length]) and answers
(hidden_states, position_embeddings). What layers get is one of the tuples below, each with the two methods by which
attention asks it: `rotate(query, key)`, and `attend(kernel, query, key, value, attention_mask, key_positions)`, which
calls `kernel(query, key, value, mask)` and gives its answer. Those that `CausalWindowAttention` asks have a third,
`rotate_to_first(query)`: the queries that ask the first tokens of a text, None where they are the same as the others.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..ops.precision import without_autocast
from .bias import biased_attention


class Plain(NamedTuple):
    """Layers are told nothing of positions."""

    def rotate(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return query, key

    def attend(self, kernel, query, key, value, attention_mask, key_positions):
        return kernel(query, key, value, attention_mask)

    def rotate_to_first(self, query: torch.Tensor) -> torch.Tensor | None:
        return None


class Rotation(NamedTuple):
    """cos of every position, and sin, negative in its first half, [batch or 1, length, 1, dim]."""

    cos: torch.Tensor
    sin: torch.Tensor

    def rotate(self, query, key):
        return rotated(query, self.cos, self.sin), rotated(key, self.cos, self.sin)

    attend, rotate_to_first = Plain.attend, Plain.rotate_to_first


class SinkRotation(NamedTuple):
    """A rotation, and another of queries for the first tokens, which they see from no farther than they ever did."""

    cos: torch.Tensor
    sin: torch.Tensor
    cos_to_first: torch.Tensor
    sin_to_first: torch.Tensor

    rotate, attend = Rotation.rotate, Plain.attend

    def rotate_to_first(self, query):
        return rotated(query, self.cos_to_first, self.sin_to_first)


class StretchedRotation(NamedTuple):
    """A rotation, and a length that grows for queries as it shrinks for keys."""

    cos: torch.Tensor
    sin: torch.Tensor
    length: torch.Tensor

    def rotate(self, query, key):
        return rotated(query, self.cos, self.sin) * self.length, rotated(key, self.cos, self.sin) / self.length

    attend = Plain.attend


class LinearBias(NamedTuple):
    """-slope |key position - query position|, a slope per head, added to the scores."""

    slopes: torch.Tensor  # [heads]
    query_positions: torch.Tensor  # [batch or 1, queries]
    causal: bool

    rotate = Plain.rotate

    def of_distance(self, distance: torch.Tensor) -> torch.Tensor:
        return distance[:, None].abs() * -self.slopes[:, None, None]

    attend = biased_attention


class TableBias(NamedTuple):
    """A number per distance and head, added to the scores; distances past the table's end count as its end."""

    table: torch.Tensor  # [buckets, heads]; the parameter itself, so that checkpointed layers find it in backward
    bucket: torch.Tensor  # [2 * reach + 1] of each distance, the middle for distance 0
    query_positions: torch.Tensor
    causal: bool

    rotate = Plain.rotate

    def of_distance(self, distance: torch.Tensor) -> torch.Tensor:
        reach = self.bucket.shape[0] // 2
        return self.table[self.bucket[distance.clamp(-reach, reach) + reach]].permute(0, 3, 1, 2)

    attend = biased_attention


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x_i, x_(i + dim/2)) of x [batch, length, heads, dim] by its angle: x cos + swapped halves sin."""
    first, second = x.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)  # not `roll`: compiled, its gradient may have other strides than told
    return torch.addcmul(x * cos, swapped, sin)


class NoPositions(nn.Module):
    """For models whose layers know the order by themselves, or not at all."""

    biased = False  # whether `attend` wants `key_positions`, the positions of all keys [batch or 1, keys]

    def __init__(self, config):
        super().__init__()

    def forward(self, hidden_states, position_ids):
        return hidden_states, Plain()


class SinusoidalPositions(NoPositions):
    """sqrt(size) x + [sin(p / 10000^(2i/size)), cos(...)] (Vaswani et al., 2017, section 3.5)."""

    def forward(self, hidden_states, position_ids):
        size = hidden_states.shape[-1]
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        exponent = torch.arange(0, size, 2, device=hidden_states.device, dtype=wide) / size
        angle = position_ids[..., None].to(wide) * 10000**-exponent
        waves = torch.cat((angle.sin(), angle.cos()), dim=-1)[..., :size]
        return hidden_states * size**0.5 + waves.to(hidden_states.dtype), Plain()


class LearnedPositions(NoPositions):
    """x + a learned vector per position, for positions below `max_position_embeddings`."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, hidden_states, position_ids):
        known = self.embed_positions.num_embeddings
        if position_ids.device.type == "cpu" and not torch.compiler.is_compiling() and position_ids.max() >= known:
            raise ValueError(
                f"Position {int(position_ids.max())} is past the {known} learned positions (max_position_embeddings): "
                "shorten the text, or use positions that need no table (rope, alibi, t5, sinusoidal)."
            )
        return hidden_states + self.embed_positions(position_ids), Plain()


class RotaryEmbedding(LlamaRotaryEmbedding):
    """RoPE (Su et al., 2021, arXiv:2104.09864) with every scaling of transformers' `rope_parameters`."""

    biased = False

    @torch.no_grad()
    @dynamic_rope_update
    def turns(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        with without_autocast(hidden_states):
            angle = position_ids[..., None].to(wide) * self.inv_freq.to(hidden_states.device, wide)
            angle = torch.cat((-angle, angle), dim=-1)[:, :, None]
            cos, sin = angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)

    def forward(self, hidden_states, position_ids):
        return hidden_states, Rotation(*self.turns(hidden_states, position_ids))


class SinkRotaryEmbedding(RotaryEmbedding):
    """RoPE in which a query at place t asks the first tokens as if it stood at min(t, sinks + window - 1), where the
    token stands in a memory of sinks and window (StreamingLLM: Xiao et al., 2023, arXiv:2309.17453, section 3.2; a
    distance ceiling as in LM-Infinite: Han et al., 2023, arXiv:2308.16137)."""

    def __init__(self, config):
        super().__init__(config)
        self.farthest = config.num_sink_tokens + config.sliding_window - 1

    def forward(self, hidden_states, position_ids):
        near, ceiling = self.turns(hidden_states, position_ids), position_ids.clamp(max=self.farthest)
        return hidden_states, SinkRotation(*near, *self.turns(hidden_states, ceiling))


class XPosRotaryEmbedding(RotaryEmbedding):
    """xPos (Sun et al., 2022, arXiv:2212.10554, equation 13): dimension i of a query at p grows by zeta_i^(p / 512),
    of a key it shrinks, zeta_i = (2i/dim + 0.4) / 1.4, so that far keys fade."""

    def forward(self, hidden_states, position_ids):
        cos, sin = self.turns(hidden_states, position_ids)
        dim, wide = cos.shape[-1], torch.promote_types(cos.dtype, torch.float32)
        zeta = (torch.arange(0, dim, 2, device=cos.device, dtype=wide) / dim + 0.4) / 1.4
        length = torch.cat((zeta, zeta)) ** (position_ids[..., None, None].to(wide) / 512)
        return hidden_states, StretchedRotation(cos, sin, length.to(cos.dtype))


class AlibiBias(NoPositions):
    """-slope_h |i - j|, slopes a geometric sequence over the heads (Press et al., 2021, arXiv:2108.12409)."""

    biased = True

    def __init__(self, config):
        super().__init__(config)
        self.num_heads, self.causal = config.num_attention_heads, config.pooling == "last"

    def slopes(self) -> list[float]:
        """2^(-8h/H) for H a power of two; else those of the power below, and every other one of the power above."""
        power = 2 ** math.floor(math.log2(self.num_heads))
        slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
        return slopes + [2 ** (-4 * (2 * head + 1) / power) for head in range(self.num_heads - power)]

    def forward(self, hidden_states, position_ids):
        slopes = torch.tensor(self.slopes(), device=hidden_states.device, dtype=hidden_states.dtype)
        return hidden_states, LinearBias(slopes, position_ids, self.causal)


class T5Bias(NoPositions):
    """A learned number per head and bucket of distances: half of the buckets for small ones, each its own, the rest
    growing with their logarithm up to a maximum (Raffel et al., 2020, arXiv:1910.10683, section 2.1)."""

    biased = True

    def __init__(self, config):
        super().__init__(config)
        self.causal = config.pooling == "last"
        self.num_buckets, self.reach = config.relative_attention_num_buckets, config.relative_attention_max_distance
        self.relative_attention_bias = nn.Embedding(self.num_buckets, config.num_attention_heads)

    def bucket(self, distance: torch.Tensor) -> torch.Tensor:
        """The bucket of key position - query position."""
        buckets = self.num_buckets if self.causal else self.num_buckets // 2
        away = -distance.clamp(max=0) if self.causal else distance.abs()
        exact = buckets // 2
        growth = torch.log(away.clamp(min=1).float() / exact) / math.log(self.reach / exact)
        far = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
        side = 0 if self.causal else (distance > 0) * buckets
        return torch.where(away < exact, away, far) + side

    def forward(self, hidden_states, position_ids):
        distance = torch.arange(-self.reach, self.reach + 1, device=hidden_states.device)
        table = self.relative_attention_bias.weight
        return hidden_states, TableBias(table, self.bucket(distance), position_ids, self.causal)
