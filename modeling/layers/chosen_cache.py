"""What a layer remembers that works on some tokens of a text only: their keys and values, as many as there are."""

import torch
from torch import nn
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING

from .cache import RecurrentCacheLayer, StaticRecurrentCacheLayer


class ChosenCacheLayer(RecurrentCacheLayer):
    """Keys and values [batch, heads, room, dim] of those tokens of a text that a layer works on, at the front of each
    row, and their number [batch]. The last place of all is for what is of no token; places past the number of a row are
    written in place, which no earlier state can tell."""

    def put(self, row: torch.Tensor, place: torch.Tensor, count: torch.Tensor, most: int | None, *pair: torch.Tensor):
        """The stores after `pair`, two of [rows, heads, tokens, dim], at the places [rows, tokens] of the rows [rows],
        -1 for the last; `count` [batch] is that of each row then, at these rows `most` or fewer."""
        stores = self.stores(pair, len(count), 1 + most)
        stores = [placed(store, row, place, new) for store, new in zip(stores, pair, strict=True)]
        self.write(0, memory_key=stores[0], memory_value=stores[1], memory_count=count)
        return stores

    def stores(self, pair: tuple[torch.Tensor, ...], batch: int, room: int) -> list[torch.Tensor]:
        if "memory_key" not in self.states:
            return [new.new_zeros(batch, new.shape[1], room, new.shape[3]) for new in pair]
        held = [self.states["memory_key"], self.states["memory_value"]]
        more = room - held[0].shape[2]
        more += max(256, room // 2) if more > 0 else 0
        return [nn.functional.pad(store, (0, 0, 0, more)) for store in held] if more > 0 else held


class StaticChosenCacheLayer(StaticRecurrentCacheLayer):
    """The same at fixed addresses, with room for all tokens from the first."""

    def __init__(self, max_cache_len: int, **kwargs):
        super().__init__(**kwargs)
        self.max_cache_len = max_cache_len

    def put(self, row, place, count, most, *pair):
        names = ("memory_key", "memory_value")
        if names[0] not in self.states:
            room = self.max_cache_len + 1
            empty = (x.new_zeros(len(count), x.shape[1], room, x.shape[3]) for x in pair)
            self.write(0, **dict(zip(names, empty, strict=True)))
        for name, new in zip(names, pair, strict=True):
            placed(self.states[name], row, place, new)
        self.write(0, memory_count=count)
        return [self.states[name] for name in names]


def placed(store: torch.Tensor, row: torch.Tensor, place: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`store` with `new` [rows, heads, tokens, dim] at its places: in place, unless a gradient goes through."""
    by_place, at = store.transpose(1, 2), (row[:, None].expand_as(place), place)
    put = by_place.index_put if new.requires_grad or store.requires_grad else by_place.index_put_
    return put(at, new.transpose(1, 2).to(store.dtype)).transpose(1, 2)


class RememberedKeys:
    """What attention takes for the cache: `update` puts the keys and values of chosen tokens into the layer's memory,
    and answers with those that they see, the first `shown` of each row."""

    def __init__(self, memory, rows: torch.Tensor, place: torch.Tensor, count: torch.Tensor, shown: int | None):
        self.memory, self.rows, self.place, self.count, self.shown = memory, rows, place, count, shown

    def update(self, key: torch.Tensor, value: torch.Tensor, *args) -> tuple[torch.Tensor, torch.Tensor]:
        stores = self.memory.put(self.rows, self.place, self.count, self.shown, key, value)
        if len(self.rows) < len(self.count):
            stores = [store.index_select(0, self.rows) for store in stores]
        return tuple(store[:, :, : self.shown].to(key.dtype) for store in stores)


class FirstKeys(RememberedKeys):
    """The same of a memory that is empty: tokens see each other. Of packed documents the last one is kept."""

    def update(self, key, value, *args):
        kept = [x if self.shown is None else x[self.shown] for x in (key, value)]
        self.memory.put(self.rows, self.place, self.count, key.shape[2], *kept)
        return key, value


# Layers that see some of the tokens, or each row at a place of its own
RAGGED = ("routed_attention", "ragged_attention")
DYNAMIC_LAYER_TYPE_MAPPING |= dict.fromkeys(RAGGED, ChosenCacheLayer)
STATIC_LAYER_TYPE_MAPPING |= dict.fromkeys(RAGGED, StaticChosenCacheLayer)
