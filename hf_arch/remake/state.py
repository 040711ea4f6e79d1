"""A model made anew, of another config and other weights, with all else as it was."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_arch.modeling.skeleton.config import ArchConfig


def remade(
    model: PreTrainedModel,
    config: ArchConfig,
    state: dict[str, torch.Tensor],
    model_class: type[PreTrainedModel] | None = None,
    **options,
) -> PreTrainedModel:
    """A model of the class, by default that of `model`, of the config and the state, that is used as `model` is: its
    type of numbers, device, mode and generation config. `options` are further ones of `from_pretrained`."""
    options |= {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
    options.setdefault("device_map", {"": model.device})
    made = (model_class or type(model)).from_pretrained(None, config=config, state_dict=state, **options)
    if model.can_generate():
        made.generation_config = copy.deepcopy(model.generation_config)
    return made.train(model.training)


def changed(config: ArchConfig, fields: dict) -> ArchConfig:
    """A config with other `fields`, and what follows from them."""
    told = config.to_dict()
    told["mixer_types"] = fields.get("layer_types", told["mixer_types"])  # as it is written
    return type(config).from_dict(told | {name: value for name, value in fields.items() if name != "layer_types"})


def refuse_adapters(model: nn.Module) -> None:
    if any("lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("An adapter is part of the weights: merge it first, with merge_and_unload().")
