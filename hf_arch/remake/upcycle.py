"""Dense models as sparse ones that begin with the same answers (Komatsuzaki et al., 2022, arXiv:2212.05055)."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_arch.convert import from_original
from hf_arch.modeling.layers.sparse import SPARSE_FEED_FORWARDS, MixtureOfExperts
from hf_arch.modeling.skeleton.backbone import Backbone
from hf_arch.modeling.skeleton.config import ArchConfig
from hf_arch.remake.state import changed, refuse_adapters, remade

NEARLY_EVEN = 1e-4  # of the usual initialisation, for a router whose probabilities are to be nearly the same


@torch.no_grad()
def upcycle(
    model: PreTrainedModel,
    experts: int = 8,
    experts_per_token: int = 2,
    layers: Iterable[int] | None = None,
    kind: str = "sparse",
    noise: float = 0.0,
    **fields,
) -> PreTrainedModel:
    """A sparse model whose experts are copies of the feed-forwards of `model`, a dense one, and so answers alike:

        sparse = hf_arch.upcycle(LlamaForCausalLM.from_pretrained(...), experts=8, layers=range(1, 32, 2))
        sparse = get_peft_model(sparse, hf_arch.lora_config(sparse, r=8))  # adapters of routers and experts, too

    `model` is of hf_arch, or one of transformers' that hf_arch converts (Llama, T5 1.1, ...); it stays as it is.
    `layers` of its stack, or of both stacks, are made sparse; all that can be by default. Routers are new and small.
    `noise` is added to the copies, in deviations of the weights: experts differ, and answers are no longer alike.
    `kind` is a type of feed-forward whose tokens choose: "sparse" and "hierarchical" take the place of gated ones,
    "switch" of dense ones. The answers of a switch count by their probabilities, nearly 1 / experts at the beginning:
    copies are larger by experts / experts_per_token to make up for it, and answers are alike to one in 10^4 or so.
    `fields` are others of the config, such as num_expert_groups, which "hierarchical" needs.

    Raises ValueError for a model that has experts, adapters, or biases in its feed-forwards, and where no layer fits.
    """
    model = as_ours(model)
    made = check_kind(model.config, kind)
    types, replaced = layers_of(model, None if layers is None else list(layers), kind)
    fields |= types | {"num_local_experts": experts, "num_experts_per_tok": experts_per_token}
    config = changed(model.config, fields)
    state, copies = dict(model.state_dict()), {}
    larger = 1.0 if made.router_class.sums_to_one else experts / experts_per_token
    for part in replaced:
        first = torch.cat([state.pop(f"{part}{name}.weight") for name in made.experts_class.first_parts])
        last = state.pop(f"{part}down_proj.weight") * larger
        for name, weight in ((made.experts_class.first_name, first), ("down_proj", last)):
            copies[f"{part}experts.{name}"] = copied = weight.repeat(experts, 1, 1)
            if noise:
                copied.add_(noise * weight.std() * torch.randn_like(copied))
    state = {name: tensor.clone() for name, tensor in state.items()} | copies
    return filled(model, config, state, NEARLY_EVEN if larger != 1 else 1.0)


def as_ours(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or what it is in hf_arch. Raises ValueError where adapters are part of its weights."""
    refuse_adapters(model)
    return model if isinstance(model.config, ArchConfig) else from_original(model)


def filled(model: PreTrainedModel, config: ArchConfig, state: dict[str, torch.Tensor], small: float) -> PreTrainedModel:
    """A model like `model`, but of the config and the state, which lacks the routers alone."""
    with torch.device("meta"):
        empty = type(model)(config).state_dict()
    for name in empty.keys() - state.keys():
        std = small * config.initializer_range
        state[name] = std * torch.randn(empty[name].shape, dtype=model.dtype, device=model.device)
    return remade(model, config, state)


def check_kind(config: ArchConfig, kind: str) -> type[MixtureOfExperts]:
    if config.has_experts:
        raise ValueError("The model has experts already: upcycle a dense one.")
    if config.mlp_bias:
        raise ValueError(
            "Experts have no bias, but the feed-forwards of the model have (mlp_bias): it has to stay dense."
        )
    known = [name for name in config.feed_forward_kinds if name in SPARSE_FEED_FORWARDS]
    known = [name for name in known if SPARSE_FEED_FORWARDS[name].tokens_choose]
    if kind not in known:
        those = f"one of {', '.join(known)}" if known else f"none of a {config.model_type}"
        raise ValueError(f"kind {kind!r} is no feed-forward that can begin as a dense one does; that is {those}.")
    return SPARSE_FEED_FORWARDS[kind]


def layers_of(model: PreTrainedModel, layers: list[int] | None, kind: str) -> tuple[dict[str, list[str]], list[str]]:
    """The new types of feed-forwards, by the field that tells them of a stack, and what the names of the parameters of
    those that are replaced begin with."""
    dense = SPARSE_FEED_FORWARDS[kind].experts_class.alone
    types, replaced = {}, []
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, Backbone)}
    depth = max(stack.config.num_hidden_layers for stack in stacks.values())
    if wrong := [layer for layer in layers or () if not 0 <= layer < depth]:
        raise ValueError(f"layers names {wrong[0]}, but there are 0 to {depth - 1}.")
    for name, stack in stacks.items():
        own = f"{name.rpartition('.')[2]}_feed_forward_types"
        field = own if hasattr(model.config, own) else "feed_forward_types"
        if field in types:
            raise ValueError(f"A {type(model).__name__} is made of several stacks, which no field of its config names.")
        types[field] = list(stack.config.feed_forward_types)
        for layer in check_layers(stack, layers, kind, dense):
            types[field][layer] = kind
            replaced.append(f"{name}{'.' if name else ''}layers.{stack.config.layer_groups[layer]}.feed_forward.")
    if not replaced:
        found = sorted({each for given in types.values() for each in given})
        raise ValueError(
            f"No layer can become {kind!r}, which is made of a {dense.__name__}: feed-forwards are of type "
            f"{', '.join(found)}. Dense ones become 'switch', gated ones 'sparse' or 'hierarchical'."
        )
    return types, list(dict.fromkeys(replaced))


def check_layers(stack: Backbone, layers: list[int] | None, kind: str, dense: type[nn.Module]) -> list[int]:
    """Those of `layers` that the stack has, by default those that can become sparse."""
    parts = [getattr(stack.layers[group], "feed_forward", None) for group in stack.config.layer_groups]
    fitting = [layer for layer, part in enumerate(parts) if type(part) is dense]
    chosen = fitting if layers is None else [layer for layer in layers if 0 <= layer < len(parts)]
    if wrong := sorted(set(chosen) - set(fitting)):
        found = stack.config.feed_forward_types[wrong[0]]
        raise ValueError(f"Layer {wrong[0]} has a feed-forward of type {found}, which cannot become {kind!r}.")
    return chosen
