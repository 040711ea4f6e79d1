"""What each kind of layer is told about its tokens, made once per forward pass."""

from collections.abc import Callable

import torch
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

from ..layers.cache import RECURRENT
from ..layers.latent_cache import LATENT
from ..ops.band import make_band


def number_documents(config, inputs_embeds, attention_mask=None, past_key_values=None, position_ids=None, **kwargs):
    """The number of each token's document, from 1, and 0 for padding; None when all are of one document.

    A document starts where `position_ids` do not go on by one (packing; only looked for where nothing is cached).
    """
    batch, length = inputs_embeds.shape[:2]
    real = None
    if attention_mask is not None and attention_mask.ndim == 2:
        real = attention_mask[:, -length:].bool()
    packed = position_ids is not None and past_key_values is None
    if not packed and real is None:
        return None
    if real is None:
        real = torch.ones(batch, length, dtype=torch.bool, device=inputs_embeds.device)
    start = torch.zeros_like(real)
    if packed:
        start[:, 1:] = (position_ids.diff(dim=-1) != 1) & real[:, 1:] & real[:, :-1]
    if not is_tracing(real) and real.all() and not start.any():
        return None
    return (start.cumsum(-1) + 1) * real


def told_apart(documents: torch.Tensor) -> torch.Tensor:
    """Position ids that jump where a document starts, as transformers finds packed documents by. Padding becomes a
    document of its own: it meets no one, and no row of the mask is empty."""
    restart = documents.diff(dim=-1, prepend=documents[:, :1]) != 0
    return torch.arange(documents.shape[1], device=documents.device) + restart.cumsum(-1)


def several(documents: torch.Tensor | None) -> bool:
    """Whether some row holds more than one document (taken for granted while tracing)."""
    return documents is not None and (is_tracing(documents) or bool(documents.max() > 1))


def causal(make_mask: Callable) -> Callable:
    """transformers looks for packed documents only where there is no padding mask: tell it of both at once.

    `prefix` [batch, length so far] (bool, optional) marks the tokens that see each other both ways. `layer_idx` is a
    layer that the mask is for: transformers by itself would take a recurrence for one with full attention.
    """

    def make(
        config,
        inputs_embeds,
        attention_mask=None,
        past_key_values=None,
        position_ids=None,
        prefix=None,
        layer_idx=None,
        **kwargs,
    ):
        told = {"attention_mask": attention_mask, "past_key_values": past_key_values, "position_ids": position_ids}
        ready = attention_mask is not None and attention_mask.ndim != 2  # it says all: positions may restart at will
        fresh = past_key_values is None and not ready
        documents = number_documents(config, inputs_embeds, **told) if fresh else None
        if several(documents):
            told |= {"attention_mask": None, "position_ids": told_apart(documents)}
        if prefix is not None:
            prefix = torch.where(prefix, 1 if documents is None else documents, -1)
        told |= {"block_sequence_ids": prefix, "layer_idx": layer_idx}
        return make_mask(config=config, inputs_embeds=inputs_embeds, **told)

    return make


def sliding(config, inputs_embeds, attention_mask=None, past_key_values=None, position_ids=None, **kwargs):
    """The last `sliding_window` tokens, counted as real ones: a band where it saves work and no one asks to see more.

    Not for a bias by distance (`biased`), for weights of all pairs, for a cache of fixed addresses, or after what is
    cached, of which no more than the window is left: these take a mask of all pairs.
    """
    fresh = past_key_values is None or not past_key_values.is_compileable and past_key_values.get_seq_length() == 0
    asked = kwargs.get("output_attentions") or config.output_attentions or kwargs.get("biased")
    asked = asked or config._attn_implementation not in ("eager", "sdpa")
    plain = attention_mask is None or attention_mask.ndim == 2
    told = {"attention_mask": attention_mask, "past_key_values": past_key_values, "position_ids": position_ids}
    if asked or not fresh or not plain or inputs_embeds.shape[1] <= config.sliding_window:
        return sliding_mask(config, inputs_embeds, **told, **kwargs)
    documents = number_documents(config, inputs_embeds, **told)
    return make_band(inputs_embeds, config.sliding_window - 1, 0, documents=documents)


sliding_mask = causal(masking_utils.create_sliding_window_causal_mask)


def bidirectional(config, inputs_embeds, attention_mask=None, past_key_values=None, position_ids=None, **kwargs):
    """Every real token of a document sees every other."""
    told = {"attention_mask": attention_mask, "past_key_values": past_key_values}
    documents = number_documents(config, inputs_embeds, position_ids=position_ids, **told)
    if not several(documents):
        return masking_utils.create_bidirectional_mask(config=config, inputs_embeds=inputs_embeds, **told)
    told = {"attention_mask": None, "past_key_values": None, "position_ids": told_apart(documents)}
    return masking_utils.create_causal_mask(
        config=config, inputs_embeds=inputs_embeds, block_sequence_ids=documents, **told
    )


def count_positions(inputs_embeds, attention_mask=None, past_key_values=None) -> torch.Tensor:
    """The place of each token among the real ones of its row, [batch or 1, length]."""
    length = inputs_embeds.shape[1]
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    start = past_key_values.get_seq_length() if past_key_values is not None else 0
    return torch.arange(length, device=inputs_embeds.device)[None] + start


def key_positions(inputs_embeds, layer_idx: int, attention_mask=None, past_key_values=None, position_ids=None):
    """The place of each key that a layer will see, [batch or 1, keys]: those in its cache and those to come."""
    if past_key_values is None:
        return count_positions(inputs_embeds, attention_mask) if position_ids is None else position_ids
    keys, start = past_key_values.get_mask_sizes(inputs_embeds.shape[1], layer_idx)
    column = torch.arange(keys, device=inputs_embeds.device) + start
    if attention_mask is None or attention_mask.ndim != 2:
        return column[None]
    place = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return place[:, column.clamp(max=place.shape[1] - 1)]


def all_straight(inputs_embeds, attention_mask=None, past_key_values=None, position_ids=None) -> bool:
    """Whether the last keys are those of the queries, and tokens that see each other are as far apart as their columns:
    then a bias by distance need not be told their positions. False where it would take tracing, or a wait, to know."""
    if past_key_values is not None and past_key_values.is_compileable or torch.compiler.is_exporting():
        return False  # the views that a straight bias is made of have one length in a program
    if attention_mask is None and (position_ids is None or past_key_values is None):
        return True  # where positions do not go on by one, a document begins
    told = attention_mask if attention_mask is not None else position_ids
    if told.ndim != 2 or told.device.type != "cpu" or is_tracing(told):
        return False
    real = torch.ones_like(position_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if ((real[:, 1:] > real[:, :-1]).sum(-1) + real[:, 0] > 1).any():
        return False  # padding in the middle
    if position_ids is None or past_key_values is None:
        return True
    counted = count_positions(inputs_embeds, attention_mask, past_key_values)
    return bool(((position_ids == counted) | ~real[:, -position_ids.shape[1] :]).all())


MASKS: dict[str, Callable] = {
    **dict.fromkeys(("full_attention", LATENT), causal(masking_utils.create_causal_mask)),
    "sliding_attention": sliding,
    "bidirectional_attention": bidirectional,
    **dict.fromkeys(RECURRENT, number_documents),
}
