"""What is wrong with a call, said before the mathematics starts."""

import functools
from collections.abc import Iterable

import torch
from torch import nn
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..layers.sparse import SPARSE_FEED_FORWARDS

KNOWN_TO_ENGINES = ("full_attention", "sliding_attention", "bidirectional_attention")


def check_inputs(config, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values) -> None:
    """Raise a ValueError that says what to do. Values are looked at on the CPU only: elsewhere it would cost a wait."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of input_ids and inputs_embeds.")
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    if tokens.ndim != (2 if inputs_embeds is None else 3):
        raise ValueError(
            f"Expected input_ids [batch, length] or inputs_embeds [batch, length, size], not {list(tokens.shape)}."
        )
    if past_key_values is not None:
        check_cache(config, past_key_values)
    if torch.compiler.is_compiling():
        return
    length = tokens.shape[1]
    if length == 0:
        raise ValueError("The text is empty: give at least one token.")
    if position_ids is not None and position_ids.shape[-1] != length:
        raise ValueError(f"position_ids has {position_ids.shape[-1]} entries for {length} tokens.")
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        check_mask(attention_mask, tokens, past_key_values)
    if input_ids is not None and input_ids.device.type == "cpu":
        low, high = input_ids.aminmax()
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"Token ids go from {int(low)} to {int(high)}, but the vocabulary has {config.vocab_size} entries: the "
                "tokenizer is of another model, or resize_token_embeddings is needed."
            )


def attends_by_itself(config) -> bool:
    """Whether the attention is an engine's own: it keeps keys and values, and says who sees whom, without our masks."""
    return config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()


def check_engine(config, biased: bool, reads_source: bool) -> None:
    """Raise a ValueError where an engine that attends by itself would answer something else than the model: it knows
    whole texts and windows, a memory for each layer, scores to which nothing is added, and vLLM the experts of Mixtral.
    """
    engine, kinds = config._attn_implementation, sorted(set(config.layer_types) - set(KNOWN_TO_ENGINES))
    plain = config.hidden_act == "silu" and config.eval_capacity_factor is None
    others = not plain or set(config.feed_forward_types) & (SPARSE_FEED_FORWARDS.keys() - {"sparse"})
    reasons = {
        f"it has layers of type {', '.join(kinds)}": kinds,
        "a bias of positions is added to its scores": biased,
        "it reads a source": reads_source,
        "its layers share parameters": len(set(config.layer_groups)) < len(config.layer_groups),
        "its experts are not Mixtral's, with silu and room for all": engine.startswith("vllm")
        and config.has_experts
        and others,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise ValueError(
            f"The attention {engine!r} cannot serve this {config.model_type}: {'; '.join(found)}. `hf-arch serve` "
            "serves every decoder."
        )


def check_checkpointing(layers: Iterable[nn.Module]) -> None:
    """Router logits leave a layer beside its answer: reentrant checkpointing lets no gradient back through them."""
    for layer in layers:
        options = getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {})
        if layer.training and layer.gradient_checkpointing and options.get("use_reentrant", True):
            raise ValueError(
                "Reentrant checkpointing lets no gradient through to the routers: with output_router_logits, take "
                "gradient_checkpointing_kwargs=dict(use_reentrant=False)."
            )


def check_mask(attention_mask: torch.Tensor, tokens: torch.Tensor, past_key_values: Cache | None) -> None:
    seen = past_key_values.get_seq_length() if past_key_values is not None else 0
    if isinstance(seen, int) and attention_mask.shape != (len(tokens), seen + tokens.shape[1]):
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)} for {len(tokens)} rows of {tokens.shape[1]} tokens"
            + (f" after {seen} cached ones: the mask covers both." if seen else ".")
        )


def check_cache(config, past_key_values: Cache) -> None:
    """A cache holds one layer of the right kind for each layer of the model."""
    layers = getattr(past_key_values, "layers", [])
    kinds = {DYNAMIC_LAYER_TYPE_MAPPING.get(kind, DynamicLayer) for kind in config.layer_types}
    if not layers and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return  # DynamicCache() grows its attention layers by itself
    fits = len(layers) == config.num_hidden_layers and all(
        may_hold(type(layer), kind) for layer, kind in zip(layers, config.layer_types, strict=True)
    )
    if not fits:
        held = ", ".join(dict.fromkeys(type(layer).__name__ for layer in layers)) or "none"
        raise ValueError(
            f"past_key_values holds {len(layers)} layers ({held}), but {config.model_type} has "
            f"{config.num_hidden_layers}, {', '.join(dict.fromkeys(config.layer_types))}: it is of another model. "
            "Give none, or DynamicCache(config=model.config)."
        )


@functools.cache
def may_hold(held: type, kind: str) -> bool:
    """Whether a layer of the class `held` may be the cache of a layer type: the nearest of its classes that is made for
    some type has to be made for this one. By name, since an exported model has classes of its own."""
    known = {name for each in {*DYNAMIC_LAYER_TYPE_MAPPING, *STATIC_LAYER_TYPE_MAPPING} for name in names_of(each)}
    nearest = next((base.__name__ for base in held.__mro__ if base.__name__ in known), None)
    return nearest in names_of(kind)


def names_of(kind: str) -> list[str]:
    return [layer.__name__ for layer in cache_layers(kind)]


def cache_layers(kind: str) -> list[type]:
    """The classes that may hold the cache of a layer type."""
    return [kinds[kind] for kinds in (DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING) if kind in kinds]
