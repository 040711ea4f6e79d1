"""What each kind of layer is told about the items of its level."""

from collections.abc import Callable

import torch

from ..layers.cache import RECURRENT
from ..layers.level import Level, LevelCache
from .masks import MASKS, number_documents

UNTOLD = {"attention_mask": None, "past_key_values": None, "position_ids": None}


def ragged(config, stream: torch.Tensor, level: Level, cache: LevelCache | None, layer_idx: int):
    """Rows are left-aligned: what is past the end of one, no item of it sees. Behind a cache, rows end at places of
    their own."""
    if cache is None or cache.first:
        return MASKS["full_attention"](config=config, inputs_embeds=stream, layer_idx=layer_idx, **UNTOLD)
    seen = cache.visible(layer_idx)
    return None if seen is None else shown(seen, config, stream)


def shown(seen: torch.Tensor, config, stream: torch.Tensor) -> torch.Tensor:
    """Which keys are seen (bool), as the kernel that the user chose takes it."""
    if config._attn_implementation != "eager":
        return seen
    return torch.zeros_like(seen, dtype=stream.dtype).masked_fill(~seen, torch.finfo(stream.dtype).min)


def by_what_is_real(make_mask: Callable) -> Callable:
    """A mask, or documents, of rows of which each is one document."""

    def make(config, stream, level: Level, cache: LevelCache | None, layer_idx: int):
        real = None if level.real is None else level.real.long()
        told = UNTOLD | {"attention_mask": real}
        return make_mask(config=config, inputs_embeds=stream, layer_idx=layer_idx, **told)

    return make


LEVEL_MASKS: dict[str, Callable] = {
    "ragged_attention": ragged,
    "bidirectional_attention": by_what_is_real(MASKS["bidirectional_attention"]),
    **dict.fromkeys(RECURRENT, by_what_is_real(number_documents)),
}
