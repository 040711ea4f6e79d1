"""Windows and attention sinks for transformers' own decoders (Llama, Qwen, ...), through its attention interfaces.

    hf_arch.register_attention("streaming", window=1024, sinks=4)
    model.set_attn_implementation("streaming")  # or from_pretrained(..., attn_implementation="streaming")
    model.generate(**inputs, past_key_values=hf_arch.window_cache(model))  # a memory that does not grow

A token sees the last `window` tokens at their true distance, and the first `sinks` of its document, which rotary
positions show from min(t, sinks + window - 1), where the query stands in such a memory (StreamingLLM, arXiv:2309.17453,
LM-Infinite, arXiv:2308.16137). Long texts are compared in blocks: cost is linear. Places count real tokens.
"""

from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import rotate_half

from hf_arch.modeling.ops.band import Band, make_band
from hf_arch.modeling.ops.banded_attention import attend_seen, banded_attention
from hf_arch.modeling.ops.documents import document_places

FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")  # whose frequencies do not depend on the text


class Streaming(NamedTuple):
    """What `register_attention` was told."""

    window: int
    sinks: int


class Seen(NamedTuple):
    """In the place of a mask: who sees whom, as a band or, where something is cached, as pairs."""

    band: Band | None
    pairs: torch.Tensor | None  # [batch, queries, keys]
    first: torch.Tensor | None  # [batch, keys] the sinks
    turn: (
        tuple[torch.Tensor, torch.Tensor] | None
    )  # cos and sin [batch, 1, queries, dim], to where sinks are asked from


PATTERNS: dict[str, Streaming] = {}


def register_attention(name: str, *, window: int, sinks: int = 0) -> None:
    """Make `name` an attention implementation of every transformers decoder that takes custom ones.

    window: how many tokens one sees, itself included; sinks: how many of the first it sees beside those. Raises
    ValueError for sizes that cannot be. Models turn halves of a head against each other, as Llama does, or have no
    rotary positions: of one that turns neighbours (GPT-J, GLM, Cohere) sinks would be seen from a wrong distance.
    """
    if window < 2 or sinks < 0:
        raise ValueError(f"window {window} must be at least 2, and sinks {sinks} at least 0.")
    pattern = PATTERNS[name] = Streaming(window, sinks)

    def mask(**told):
        return make_seen(pattern, **told)

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)


def attend(module, query, key, value, attention_mask, scaling=None, dropout: float = 0.0, **kwargs):
    """As transformers calls it: query [batch, heads, queries, dim] -> ([batch, queries, heads, dim], None)."""
    if unknown := [option for option in ("softcap", "s_aux") if kwargs.get(option) is not None]:
        raise ValueError(f"{type(module).__name__} asks for {', '.join(unknown)}, which windows do not know.")
    if not isinstance(attention_mask, Seen):  # one that the caller made, of all pairs
        told = {"scaling": scaling, "dropout": dropout}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **told)
    other = None if attention_mask.turn is None else turned(query, *attention_mask.turn).transpose(1, 2)
    tokens = (x.transpose(1, 2) for x in (query, key, value))
    told = {"scale": scaling, "dropout": dropout, "landmark_query": other}
    if attention_mask.band is not None:
        return banded_attention(*tokens, attention_mask.band, **told)[0], None
    return attend_seen(*tokens, attention_mask.pairs, attention_mask.first, **told), None


def turned(query: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first cos.shape[-1] numbers of each head."""
    front, rest = query.split((cos.shape[-1], query.shape[-1] - cos.shape[-1]), dim=-1)
    return torch.cat((front * cos.to(query.dtype) + rotate_half(front) * sin.to(query.dtype), rest), dim=-1)


def make_seen(
    pattern: Streaming,
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset=0,
    kv_offset: int = 0,
    mask_function,
    attention_mask=None,
    dtype=torch.float32,
    config=None,
    device="cpu",
    local_size: int | None = None,
    **kwargs,
) -> Seen:
    """As transformers calls the maker of a mask. `local_size` is the window of the model's own, which stays."""
    if isinstance(q_offset, torch.Tensor) or q_offset == 0 and kv_length != q_length:
        raise ValueError("A static cache holds all tokens: generate with past_key_values=hf_arch.window_cache(model).")
    own = pattern._replace(window=min(pattern.window, local_size or pattern.window))
    if q_offset == 0:
        documents = documents_of(mask_function, attention_mask, batch_size, q_length, device)
        place, like = document_places(documents), torch.empty(batch_size, q_length, dtype=dtype, device=device)
        first = (place < own.sinks) & (documents > 0) if own.sinks else None
        plain = bool((documents == 1).all())
        told = (None if plain else documents, first, own.sinks if plain else None)
        band = make_band(like, own.window - 1, 0, 1, *told)
        return Seen(band, None, None, turn_to_sinks(own, place, config))
    columns = key_columns(pattern, q_length, kv_length, q_offset, kv_offset, device)
    total = q_offset + q_length
    real = torch.ones(batch_size, total, device=device).bool() if attention_mask is None else attention_mask[:, :total]
    place = real.long().cumsum(1) - 1
    query_place, key_place = place[:, q_offset:], place[:, columns]
    first = (key_place < own.sinks) & real[:, columns]
    if (first.sum(1) < real.sum(1).clamp(max=own.sinks)).any():
        raise ValueError(
            "The first tokens of a padded row are no longer in the cache: give window_cache(model, padding=...), the "
            "most columns of padding before a text."
        )
    distance = query_place[:, :, None] - key_place[:, None]
    pairs = (distance >= 0) & ((distance < own.window) | first[:, None]) & real[:, None, columns]
    pairs = pairs | (columns == torch.arange(q_offset, total, device=device)[:, None])
    return Seen(None, pairs, first, turn_to_sinks(own, query_place, config))


def documents_of(mask_function, attention_mask, batch: int, length: int, device) -> torch.Tensor:
    """[batch, length] as in `ops/documents.py`. The mask of transformers knows where packed documents begin: a token
    does not see the one before it."""
    real = torch.ones(batch, length, dtype=torch.bool, device=device)
    if attention_mask is not None:
        real = attention_mask[:, :length].bool()
    start = torch.zeros_like(real)
    if length > 1:
        row, zero = torch.arange(batch, device=device)[:, None], torch.zeros(1, 1, dtype=torch.long, device=device)
        column = torch.arange(length, device=device)[None]
        if mask_function(row, zero, zero, zero + 1).any():
            raise ValueError("This model sees the future: register_attention is for decoders.")
        start[:, 1:] = ~mask_function(row, zero, column[:, 1:], column[:, :-1]) & real[:, 1:] & real[:, :-1]
    return (start.cumsum(1) + 1) * real


def key_columns(pattern: Streaming, q_length: int, kv_length: int, seen: int, kv_offset: int, device) -> torch.Tensor:
    """[keys] where in the text the keys of a cache stand: all, the last ones, or those of `WindowCacheLayer`."""
    held = kv_length - q_length
    if kv_offset or held == seen:
        return kv_offset + torch.arange(kv_length, device=device)
    last = torch.arange(seen - pattern.window + 1, seen + q_length, device=device)
    return torch.cat((torch.arange(kv_length - len(last), device=device), last))


def turn_to_sinks(pattern: Streaming, place: torch.Tensor, config) -> tuple[torch.Tensor, torch.Tensor] | None:
    """cos and sin of the way back from `place` [batch, queries] to where the sinks are asked from; None where nothing
    is rotated or no place is so far."""
    late = (place - (pattern.sinks + pattern.window - 1)).clamp(min=0)
    rope = getattr(config, "rope_parameters", None)
    if not pattern.sinks or not rope or not late.any():
        return None
    if rope.get("rope_type") not in FIXED_ROTATIONS:
        raise ValueError(f"Sinks need rotary positions of type {', '.join(FIXED_ROTATIONS)}, or none, not {rope}.")
    frequency = frequencies(config).to(place.device, torch.float64)
    angle = -late[:, None, :, None].double() * torch.cat((frequency, frequency))
    return angle.cos(), angle.sin()


def frequencies(config) -> torch.Tensor:
    """[pairs] by how much a pair of numbers of a head turns from place to place."""
    rope = config.rope_parameters
    if rope["rope_type"] != "default":
        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, None)[0]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head * rope.get("partial_rotary_factor", 1.0))
    return rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)


class WindowCacheLayer(DynamicLayer):
    """Keys and values of the first columns and of the last `window - 1`: as many, however long the text."""

    is_croppable = False

    def __init__(self, window: int, first: int):
        super().__init__()
        self.window, self.first, self.cumulative_length = window, first, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        held = [torch.cat(pair, dim=-2) for pair in ((self.keys, key_states), (self.values, value_states))]
        self.keys, self.values = map(self.kept, held)
        return tuple(held)

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2] < self.first + self.window:
            return x
        return torch.cat((x[..., : self.first, :], x[..., 1 - self.window :, :]), dim=-2)

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.keys.shape[-2] if self.is_initialized else 0) + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        raise RuntimeError("A window cannot go back in the text: generate without assisted decoding.")


def window_cache(model: PreTrainedModel, padding: int = 0) -> Cache:
    """The memory of `model`, whose attention is one of `register_attention`, to be given to it or to generate() as
    `past_key_values`. `padding` is the most columns of padding before a text of the batch."""
    config = model.config.get_text_config(decoder=True)
    pattern = PATTERNS.get(config._attn_implementation)
    if pattern is None:
        raise ValueError(
            f"The attention of the model is {config._attn_implementation!r}: call hf_arch.register_attention(name, "
            "window=...) and model.set_attn_implementation(name) first."
        )
    first = pattern.sinks + padding
    return Cache(layers=[WindowCacheLayer(pattern.window, first) for _ in range(config.num_hidden_layers)])
