"""Where a model has heads, channels, experts and layers, and which numbers are theirs."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hf_arch.modeling.layers.attention import Attention, BidirectionalAttention, CrossAttention, SlidingAttention
from hf_arch.modeling.layers.early_exit import CarryingAttention
from hf_arch.modeling.layers.experts import SideBySide
from hf_arch.modeling.layers.feed_forward import MLP
from hf_arch.modeling.layers.retrieval_attention import RetrievalAttention
from hf_arch.modeling.layers.sparse import MixtureOfExperts
from hf_arch.modeling.layers.window_attention import CausalWindowAttention
from hf_arch.modeling.skeleton.backbone import Backbone
from hf_arch.modeling.skeleton.config import ArchConfig
from hf_arch.modeling.state_space.rwkv4.modeling_rwkv4 import RWKV4ChannelMixing
from hf_arch.modeling.state_space.rwkv7.modeling_rwkv7 import RWKV7ChannelMixing

# Attention whose heads differ by their weights alone: not by a pattern, a slope or an order of their own
ALIKE = (
    *(Attention, BidirectionalAttention, CarryingAttention, CausalWindowAttention, CrossAttention),
    *(RetrievalAttention, SlidingAttention),
)
# The projections into a feed-forward, and the one out of it
INSIDE = {
    MLP: (("up_proj", "gate_proj"), "down_proj"),
    RWKV4ChannelMixing: (("key",), "value"),
    RWKV7ChannelMixing: (("up_proj",), "down_proj"),
}


@dataclass(frozen=True)
class Site:
    """Units of which some go. slices: by the name of a tensor the dimension along which units lie, how many numbers one
    has there, and how often the units follow each other. `scored` names the tensor by which units answer."""

    units: int
    count: int  # that stay
    slices: dict[str, tuple[int, int, int]]
    scored: str
    groups: int = 1  # from which as many units stay, each as wide

    def best(self, scores: torch.Tensor) -> torch.Tensor:
        """[units] -> the numbers of those that stay, in order"""
        each = scores.unflatten(0, (self.groups, -1))
        chosen = each.topk(self.count // self.groups, dim=-1).indices
        offset = torch.arange(self.groups, device=scores.device)[:, None] * each.shape[1]
        return (chosen + offset).flatten().sort().values

    def scores(self, counted: dict[str, torch.Tensor]) -> torch.Tensor:
        """[units], of what each weight counts for."""
        dim = self.slices[self.scored][0]
        return counted[self.scored].movedim(dim, 0).unflatten(0, (self.units, -1)).flatten(1).sum(-1).abs()

    def cut(self, state: dict[str, torch.Tensor], kept: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state without the other units."""
        made = dict(state)
        for name, (dim, width, times) in self.slices.items():
            if name in state:
                starts = torch.arange(times, device=kept.device)[:, None] * self.units + kept
                numbers = starts.flatten()[:, None] * width + torch.arange(width, device=kept.device)
                made[name] = state[name].index_select(dim, numbers.flatten().to(state[name].device))
        return made

    def fields(self, kept: torch.Tensor) -> dict:
        """Those of the config that rest on which units stay."""
        return {}


@dataclass(frozen=True)
class Stack:
    """Layers of which some go. path: what the names of their parameters begin with; prefix: of the fields of config."""

    path: str
    prefix: str
    config: ArchConfig
    count: int  # that stay

    @property
    def units(self) -> int:
        return self.config.num_hidden_layers

    def start(self, layer: int) -> str:
        return f"{self.path}layers.{layer}."

    def scores(self, counted: dict[str, torch.Tensor]) -> torch.Tensor:
        sums = [
            [weight.abs().sum() for name, weight in counted.items() if name.startswith(self.start(layer))]
            for layer in range(self.units)
        ]
        return torch.stack([torch.stack(each).sum() for each in sums])

    def best(self, scores: torch.Tensor) -> torch.Tensor:
        later = scores[1:].topk(self.count - 1).indices.sort().values + 1
        return torch.cat((later.new_zeros(1), later))

    def cut(self, state: dict[str, torch.Tensor], kept: torch.Tensor) -> dict[str, torch.Tensor]:
        places = {self.start(old): self.start(new) for new, old in enumerate(kept.tolist())}
        made = {}
        for name, tensor in state.items():
            layer = next((start for start in map(self.start, range(self.units)) if name.startswith(start)), None)
            if layer is None:
                made[name] = tensor
            elif layer in places:
                made[places[layer] + name.removeprefix(layer)] = tensor
        return made

    def fields(self, kept: torch.Tensor) -> dict:
        types = {name: getattr(self.config, name) for name in ("layer_types", "feed_forward_types")}
        told = {f"{self.prefix}{name}": [each[i] for i in kept.tolist()] for name, each in types.items()}
        return told | {f"{self.prefix}num_hidden_layers": len(kept)}


def stacks_of(model: PreTrainedModel, share: float) -> list[Stack]:
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, Backbone):
            continue
        own = f"{name.rpartition('.')[2]}_"
        prefix = own if hasattr(model.config, f"{own}num_hidden_layers") else ""
        if prefix in found or len(module.layers) != module.config.num_hidden_layers:
            raise ValueError("Layers that share their parameters, or of stacks that no field names, cannot go.")
        count = stays(module.config.num_hidden_layers, share)
        found[prefix] = Stack(f"{name}." if name else "", prefix, module.config, count)
    return [*found.values()]


def stays(count: int, share: float, least: int = 1) -> int:
    return max(least, round(count * (1 - share)))


def heads(model: PreTrainedModel, share: float) -> tuple[dict, list[Site]]:
    """Query heads, with the key and value head that they share."""
    config, sites = model.config, []
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    shared = config.num_attention_heads // groups
    units, wide = (config.num_attention_heads, 1) if groups == 1 else (groups, shared)
    count = stays(units, share)
    for name, module in model.named_modules():
        if isinstance(module, Backbone) and hasattr(module.embed_positions, "num_heads"):
            raise ValueError("Heads whose positions differ by head (ALiBi, T5) cannot go: each would become another.")
        if type(module) not in ALIKE:
            continue
        dim = module.head_dim
        of = {"q_proj": (0, wide * dim), "k_proj": (0, dim), "v_proj": (0, dim), "o_proj": (1, wide * dim)}
        if groups == 1:
            of = {each: of[each] for each in ("q_proj", "o_proj")}
        slices = {f"{name}.{each}.weight": (*where, 1) for each, where in of.items()}
        slices |= {f"{name}.{each}.bias": (*where, 1) for each, where in of.items() if each != "o_proj"}
        sites.append(Site(units, count, slices, f"{name}.o_proj.weight"))
    if not sites:
        raise ValueError("The model has no heads that differ by their weights alone.")
    fields = {"num_attention_heads": count * wide, "head_dim": dim}
    if getattr(config, "num_key_value_heads", None) and groups > 1:
        fields["num_key_value_heads"] = count
    return fields, sites


def channels(model: PreTrainedModel, share: float) -> tuple[dict, list[Site]]:
    """Numbers inside feed-forwards and experts."""
    config, sites = model.config, []
    sizes = {"intermediate_size": config.intermediate_size, "moe_intermediate_size": config.moe_intermediate_size}
    fields = {name: stays(size, share) for name, size in sizes.items() if size}
    kept = {sizes[name]: count for name, count in fields.items()}
    for name, module in model.named_modules():
        if isinstance(module, SideBySide):
            inner = module.down_proj.shape[-1]
            first = (1, 1, len(module.first_parts))
            slices = {f"{name}.{module.first_name}": first, f"{name}.down_proj": (2, 1, 1)}
            sites.append(Site(inner, kept.get(inner, inner), slices, f"{name}.down_proj"))
        elif kind := next((each for each in INSIDE if isinstance(module, each)), None):
            into, out = INSIDE[kind]
            inner = getattr(module, out).in_features
            several = next((size for size in kept if inner % size == 0), inner)  # shared experts are several in one
            slices = {f"{name}.{each}.{end}": (0, 1, 1) for each in into for end in ("weight", "bias")}
            slices[f"{name}.{out}.weight"] = (1, 1, 1)
            count = kept.get(inner, inner // several * kept.get(several, several))
            sites.append(Site(inner, count, slices, f"{name}.{out}.weight"))
    if not sites:
        raise ValueError("The model has no feed-forwards whose channels could go.")
    return fields, sites


def experts(model: PreTrainedModel, share: float) -> tuple[dict, list[Site]]:
    config, sites = model.config, []
    groups = getattr(config, "n_group", None) or config.num_expert_groups or 1
    for name, module in model.named_modules():
        if not isinstance(module, MixtureOfExperts) or not module.tokens_choose:
            continue
        if not isinstance(module.experts, SideBySide):
            raise ValueError("The experts are modules (separate_experts): prune before quantising.")
        units, taken = module.num_experts, config.num_experts_per_tok
        count = stays(units // groups, share, -(-taken // groups)) * groups
        slices = {f"{name}.experts.{each}": (0, 1, 1) for each in (module.experts.first_name, "down_proj")}
        state = {**dict(module.router.named_parameters()), **dict(module.router.named_buffers())}
        told = (each for each, tensor in state.items() if tensor.ndim and len(tensor) == units and each[:5] != "group")
        slices |= {f"{name}.router.{each}": (0, 1, 1) for each in told}
        sites.append(Site(units, count, slices, f"{name}.experts.down_proj", groups))
    if not sites:
        raise ValueError("The model has no experts among which tokens choose.")
    return {"num_local_experts": sites[0].count}, sites


SITES = {"heads": heads, "channels": channels, "experts": experts}
