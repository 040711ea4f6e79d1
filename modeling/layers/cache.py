"""What a layer remembers between calls.

For recurrences a layer of our own: transformers' "linear_attention" counts on a convolution. For attention one that
takes the place of transformers' DynamicLayer, which copies all keys and values at every step.
"""

import torch
from torch import nn
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    StaticLayer,
)


class RecurrentCacheLayer(CacheLayerMixin):
    """Named tensors of fixed size, batch first, and the number of tokens they sum up.

    A state of zeros is that of a row which has read nothing. Tensors are replaced, so that those of an earlier moment
    can be kept at no cost; a step that changes a small part of a large one may write into it where it is `writable`.
    """

    supports_early_init = False
    is_croppable = True

    def __init__(self, **kwargs):
        super().__init__()
        self.states: dict[str, torch.Tensor] = {}
        self.cumulative_length: int | torch.Tensor = 0
        self.record_past = False
        self.past: list[tuple[int, dict[str, torch.Tensor]]] = []  # length and states before each call
        self.rooms: dict[str, torch.Tensor] = {}  # what `follow` made: states are parts of it

    def write(self, new_tokens: int, **states: torch.Tensor) -> None:
        """The states after `new_tokens` more: the mixer of a layer writes all of its own at once, for each call of the
        model, and what else in the layer has a state adds it with `new_tokens` 0."""
        if self.record_past and new_tokens:
            self.past.append((self.cumulative_length, dict(self.states)))
        self.states.update(states)
        self.cumulative_length += new_tokens
        self.is_initialized = True

    def read(self, name: str) -> torch.Tensor | None:
        return self.states.get(name) if self.is_initialized else None

    def writable(self, state: torch.Tensor, appended: bool = False) -> bool:
        """Whether a step may write into a state that it has read: no one keeps what it was, no gradient needs it. What
        is `appended`, where an earlier moment reads nothing, does not trouble who keeps it."""
        if self.record_past and not appended or torch.is_grad_enabled():
            return False
        return torch.compiler.is_compiling() or not state.is_inference() or torch.is_inference_mode_enabled()

    def follow(self, name: str, after: torch.Tensor) -> torch.Tensor:
        """What the state `name` [batch, held, ...] holds, and `after` [batch, new, ...] behind it. They are put into a
        room with space for more, in which the state of the next call begins later: only now and then is it copied."""
        held, new = self.states[name], after.shape[1]
        if torch.compiler.is_compiling() or not self.writable(held, appended=True):
            return torch.cat((held.to(after.dtype), after), dim=1)
        room, size = self.rooms.get(name), held.shape[1]
        end = None if room is None else place_in(room, held) + size
        if end is None or end < size or end + new > room.shape[1] or room.dtype != after.dtype:
            room = self.rooms[name] = after.new_empty(len(held), size + new + size // 4, *held.shape[2:])
            room[:, :size], end = held, size
        room[:, end : end + new] = after
        return room[:, end - size : end + new]

    @property
    def batch_size(self) -> int:
        return next((len(state) for state in self.states.values()), -1)

    def get_seq_length(self) -> int | torch.Tensor:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        """How many columns of what was read a mask has to tell of; a state has none."""
        return -1

    def reset(self) -> None:
        self.states, self.cumulative_length, self.is_initialized = {}, 0, False
        self.past.clear()
        self.rooms.clear()

    def change(self, each) -> None:
        self.past.clear()
        self.states = {name: each(state) for name, state in self.states.items()}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.change(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.change(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.change(lambda state: state[indices])

    def forget(self, rows: torch.Tensor) -> None:
        """The rows that are True in [batch] begin a new text."""
        self.change(lambda state: state.masked_fill(rows.to(state.device).view(-1, *[1] * (state.ndim - 1)), 0))

    def activate_past_recording(self) -> None:
        """Keep the state before each call until the next `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Go back to the latest recorded state that lacks the last `-tokens_to_remove` tokens. It may lack more, those
        of a call that went past it: the length tells, and they are to be read again."""
        length = self.cumulative_length - abs(tokens_to_remove)
        before = [(seen, states) for seen, states in self.past if seen <= length]
        if tokens_to_remove and not before:
            raise RuntimeError(
                "A recurrent state cannot forget its last tokens. Call activate_past_recording() before they are read, "
                "or keep a copy: hf_arch.fork(past_key_values)."
            )
        if tokens_to_remove:
            self.cumulative_length, self.states = before[-1]
            self.is_initialized = bool(self.states)
        self.past.clear()

    def lazy_initialization(self, key_states, value_states) -> None:
        raise TypeError("A recurrent layer stores states, not keys and values: this cache is of another model.")

    update = lazy_initialization

    def offload(self) -> None:
        """A state is small: it stays where it is."""

    prefetch = offload


def place_in(room: torch.Tensor, held: torch.Tensor) -> int:
    """Where along the second dimension of `room` the tensor `held`, a part of it, begins; far below 0 if it is none."""
    within = held.untyped_storage().data_ptr() == room.untyped_storage().data_ptr() and held.dtype == room.dtype
    if not within or len(held) != len(room) or held.stride() != room.stride():
        return -room.shape[1] - held.shape[1]
    return held.storage_offset() // room.stride(1)


class StaticRecurrentCacheLayer(RecurrentCacheLayer):
    """The same at fixed addresses, written in place: for compiled decoding and CUDA graphs."""

    is_compileable = True
    is_croppable = False

    def __init__(self, max_cache_len: int | None = None, **kwargs):
        super().__init__(**kwargs)
        self.cumulative_length = torch.zeros((), dtype=torch.long)

    def write(self, new_tokens: int, **states: torch.Tensor) -> None:
        for name, state in states.items():
            if name not in self.states:
                self.states[name] = self.at_fixed_address(torch.empty_like(state))
            self.states[name].copy_(state)
        if not self.is_initialized and self.states:
            device = next(iter(self.states.values())).device
            self.cumulative_length = self.at_fixed_address(self.cumulative_length.to(device))
            self.is_initialized = True
        self.cumulative_length.add_(new_tokens)

    def follow(self, name: str, after: torch.Tensor) -> torch.Tensor:
        return torch.cat((self.states[name].to(after.dtype), after), dim=1)

    def at_fixed_address(self, tensor: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(tensor)
        return tensor

    def change(self, each) -> None:
        for state in self.states.values():
            state.copy_(each(state))

    def reset(self) -> None:
        for state in self.states.values():
            state.zero_()
        self.cumulative_length.zero_()
        self.is_initialized = False


class HistoryCacheLayer(RecurrentCacheLayer):
    """The same with states that grow: those whose names begin with history hold all tokens of the text, [batch,
    channels, tokens], the newest first, zero where there are fewer."""

    def room(self, new_tokens: int) -> int:
        """For how many tokens in all there must be room now."""
        return self.cumulative_length + new_tokens


class StaticHistoryCacheLayer(StaticRecurrentCacheLayer):
    """The same at fixed addresses, with room for all tokens from the first."""

    def __init__(self, max_cache_len: int, **kwargs):
        super().__init__(**kwargs)
        self.max_cache_len = max_cache_len

    def room(self, new_tokens: int) -> int:
        return self.max_cache_len

    def write(self, new_tokens: int, **states: torch.Tensor) -> None:
        """Negative padding cuts."""
        for name, state in states.items():
            if name.startswith("history"):
                states[name] = nn.functional.pad(state, (0, self.max_cache_len - state.shape[-1]))
        super().write(new_tokens, **states)


# The layers that keep states, as config.layer_types names them: what a new recurrence has to be in
RECURRENT = (
    "causal_window_attention",
    "favor",
    "compressive_recurrence",
    "h3",
    "hyena",
    "local_attention",
    "lsh_attention",
    "modal_hyena",
    "patch_attention",
    "retention",
    "retrieval_attention",
    "routing",
    "rwkv4",
    "rwkv7",
    "s4",
    "s4d",
    "s6",
    "segment_recurrence",
    "sink_attention",
    "ssd",
)
DYNAMIC_LAYER_TYPE_MAPPING |= dict.fromkeys(RECURRENT, RecurrentCacheLayer)
STATIC_LAYER_TYPE_MAPPING |= dict.fromkeys(RECURRENT, StaticRecurrentCacheLayer)
# A block at random may be any of the earlier ones: all keys and values are kept
DYNAMIC_LAYER_TYPE_MAPPING["causal_block_sparse_attention"] = DynamicLayer
STATIC_LAYER_TYPE_MAPPING["causal_block_sparse_attention"] = StaticLayer
DYNAMIC_LAYER_TYPE_MAPPING |= dict.fromkeys(("hyena", "retrieval_attention"), HistoryCacheLayer)
STATIC_LAYER_TYPE_MAPPING |= dict.fromkeys(("hyena", "retrieval_attention"), StaticHistoryCacheLayer)

# Attention by patterns that reach back without end, or of layers that tokens leave, keeps all keys and values
PATTERNS = ("dilated_attention", "early_exit_attention", "fixed_attention", "strided_attention")
DYNAMIC_LAYER_TYPE_MAPPING |= dict.fromkeys(PATTERNS, DynamicLayer)
STATIC_LAYER_TYPE_MAPPING |= dict.fromkeys(PATTERNS, StaticLayer)


class GrowingCacheLayer(DynamicLayer):
    """Keys and values, [batch, heads, length, dim], at the front of a store with room for more: a step writes its own
    token and copies the others only when the room is used up."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.stores: tuple[torch.Tensor, torch.Tensor] | None = None
        self.front: torch.Tensor | None = None  # the keys as this class left them; others may have replaced them since

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        if key_states.requires_grad or torch.compiler.is_compiling():
            return super().update(key_states, value_states)
        seen = self.keys.shape[-2]
        length = seen + key_states.shape[-2]
        if self.front is not self.keys or length > self.stores[0].shape[-2]:
            self.stores = tuple(with_room(held, length + max(256, length // 2)) for held in (self.keys, self.values))
        for store, new in zip(self.stores, (key_states, value_states), strict=True):
            store[:, :, seen:length] = new
        self.keys, self.values = (store[:, :, :length] for store in self.stores)
        self.front = self.keys
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        ours = self.front is self.keys
        super().crop(tokens_to_remove)
        self.front = self.keys if ours else None  # the store still begins with what is left


def with_room(held: torch.Tensor, length: int) -> torch.Tensor:
    """A tensor of `length` along the second dimension from the end that begins with `held`."""
    store = held.new_empty(*held.shape[:-2], length, held.shape[-1])
    store[..., : held.shape[-2], :] = held
    return store


def growing(cache: Cache) -> Cache:
    """The cache with its empty DynamicLayers replaced."""
    fresh = (type(layer) is DynamicLayer and not layer.is_initialized for layer in cache.layers)
    cache.layers = [GrowingCacheLayer() if new else layer for layer, new in zip(cache.layers, fresh, strict=True)]
    return cache
