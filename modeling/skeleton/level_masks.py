"""What each kind of layer is told about the items of its level."""

from collections.abc import Callable

import torch

from ..layers.cache import RECURRENT
from ..layers.level import Level, LevelCache
from ..ops.patches import PatchRows
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


def by_patch(config, stream, level: Level, cache: LevelCache | None, layer_idx: int) -> PatchRows:
    """Items of a patch of `config.patch_size` see each other, up to themselves."""
    size, late = config.patch_size, None
    lengths = None if level.real is None else level.real.sum(1)
    if level.before is not None:
        late = level.place[:, 0] % size
    patches = PatchRows(size, stream.shape[1], late, lengths, None)
    if patches.step:
        seen = torch.arange(size, device=stream.device) <= late[:, None]
        return patches._replace(mask=shown(seen[:, None, None], config, stream))
    patch = stream[:1, :1].expand(-1, size, -1)
    mask = MASKS["full_attention"](config=config, inputs_embeds=patch, layer_idx=layer_idx, **UNTOLD)
    return patches._replace(mask=mask)


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
    "patch_attention": by_patch,
}
