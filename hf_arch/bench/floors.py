"""The least time that a model could take: its matrix products at the machine's rate, and its exponentials.

    floor of a pass = operations / matmul rate + exponentials / exponential rate
    floor of a step = the same, or bytes of weights and state / bandwidth where that is more, + exponentials / rate

All else (norms, rotations, gates, masks) is taken to be free, as in a perfectly fused kernel. `cost` walks the modules
of a model; a new mixer or feed-forward registers what it computes beside its Linear layers.
"""

import math
from dataclasses import dataclass
from functools import singledispatch
from typing import NamedTuple

import torch
from torch import nn

from hf_arch.modeling.hierarchical.hat.modeling_hat import ArchHatModel
from hf_arch.modeling.layers.attention import Attention
from hf_arch.modeling.layers.experts import SparseFeedForward
from hf_arch.modeling.layers.feed_forward import MLP
from hf_arch.modeling.layers.mixer import Mixer
from hf_arch.modeling.layers.state_space import DiagonalStateSpace
from hf_arch.modeling.long_context.longformer.modeling_longformer import WindowAttention
from hf_arch.modeling.skeleton.backbone import Backbone
from hf_arch.modeling.state_space.h3.modeling_h3 import H3
from hf_arch.modeling.state_space.retnet.modeling_retnet import MultiScaleRetention
from hf_arch.modeling.state_space.s4.modeling_s4 import S4D
from hf_arch.modeling.state_space.s6.modeling_s6 import S6
from hf_arch.modeling.state_space.ssd.modeling_ssd import SSD

CHUNK = 64  # tokens that a linear recurrence takes at once: fewer do not fill a matrix product, more are more work


class Span(NamedTuple):
    """The tokens that a pass reads, and those that it remembers."""

    tokens: int
    before: int = 0


@dataclass(frozen=True)
class Cost:
    operations: float = 0.0  # of matrix products, a multiply-add as two
    exponentials: float = 0.0
    numbers: float = 0.0  # weights and state that are read or written

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.operations + other.operations,
            self.exponentials + other.exponentials,
            self.numbers + other.numbers,
        )


def visible_pairs(span: Span, window: int | None = None, causal: bool = True) -> float:
    """How many (query, key) pairs attention compares."""
    keys = span.before + span.tokens
    if not causal:
        return span.tokens * keys
    if window is None:
        return span.tokens * span.before + span.tokens * (span.tokens + 1) / 2
    return sum(min(position + 1, window) for position in range(span.before, keys))


@singledispatch
def cost(module: nn.Module, span: Span) -> Cost:
    """What a module computes: by default, what its parts do."""
    if isinstance(module, Mixer):
        raise TypeError(f"floors.py knows no cost of {type(module).__name__}: register one.")
    return sum((cost(child, span) for child in module.children()), Cost())


@cost.register
def linear(module: nn.Linear, span: Span) -> Cost:
    return Cost(operations=2 * module.weight.numel() * span.tokens, numbers=module.weight.numel())


@cost.register
def backbone(module: Backbone, span: Span) -> Cost:
    """Layers that share their weights are as much work as others."""
    return sum((cost(module.layers[group], span) for group in module.config.layer_groups), Cost())


@cost.register
def hierarchy(module: ArchHatModel, span: Span) -> Cost:
    """Each layer reads the members of its level, a segment at a time."""
    total = Cost()
    for layer, kind in zip(module.layers, module.config.layer_types, strict=True):
        level = module.config.layer_kinds.index(kind)
        lengths = module.config.level_lengths
        whole, rest = divmod(math.ceil(span.tokens / math.prod(lengths[:level])), lengths[level])
        total = sum([cost(layer, Span(lengths[level]))] * whole, total)
        total += cost(layer, Span(rest)) if rest else Cost()
    return total


@cost.register
def feed_forward(module: MLP, span: Span) -> Cost:
    """An exponential for each number that a smooth activation (silu, gelu, tanh, ...) is applied to."""
    smooth = 0 if isinstance(module.act_fn, nn.ReLU) else module.up_proj.out_features
    return projections(module, span) + Cost(exponentials=smooth * span.tokens)


@cost.register
def experts(module: SparseFeedForward, span: Span) -> Cost:
    """Each token's own experts; of their weights, as many as so few tokens can ask for."""
    made, router = module.experts, module.router
    chosen = router.top_k * span.tokens
    of_one = made.gate_up_proj[0].numel() + made.down_proj[0].numel()
    smooth = 0 if isinstance(made.act_fn, nn.ReLU) else made.down_proj.shape[-1]
    return cost(router, span) + Cost(
        operations=2 * of_one * chosen,
        exponentials=smooth * chosen,
        numbers=of_one * min(chosen, made.num_experts),
    )


@cost.register
def attention(module: Attention, span: Span) -> Cost:
    pairs = visible_pairs(span, module.sliding_window, module.is_causal)
    keys = span.before + span.tokens
    if module.sliding_window is not None:
        keys = min(keys, module.sliding_window)
    heads, size = module.q_proj.out_features // module.head_dim, module.q_proj.out_features
    return projections(module, span) + Cost(
        operations=4 * pairs * size,
        exponentials=pairs * heads,
        numbers=keys * (module.k_proj.out_features + module.v_proj.out_features),
    )


@cost.register
def window(module: WindowAttention, span: Span) -> Cost:
    """No token is global: the projections of global tokens read none."""
    reach, step = module.band[0] // 2, module.band[1]
    columns = range(span.tokens)
    near = (min(column // step, reach) + min((span.tokens - 1 - column) // step, reach) + 1 for column in columns)
    pairs, used = sum(near), (module.q_proj, module.k_proj, module.v_proj, module.o_proj)
    heads = module.q_proj.out_features // module.head_dim
    return sum((linear(projection, span) for projection in used), Cost()) + Cost(
        operations=4 * pairs * module.q_proj.out_features, exponentials=pairs * heads
    )


@cost.register
def retention(module: MultiScaleRetention, span: Span) -> Cost:
    key_size, value_size = module.q_proj.out_features, module.v_proj.out_features
    state = key_size * value_size / module.num_heads
    within = 2 * min(CHUNK, span.tokens) * (key_size + value_size) if span.tokens > 1 else 0
    return projections(module, span) + Cost(
        operations=span.tokens * (4 * state + within),
        exponentials=span.tokens * value_size,
        numbers=2 * state,
    )


@cost.register
def ssd(module: SSD, span: Span) -> Cost:
    """Scores of a chunk once for each group; a decay, a step and a gate by exponentials."""
    inner, shared, _ = module.mixed_sizes
    states = shared // module.n_groups * inner
    within = 2 * min(CHUNK, span.tokens) * (shared + inner) if span.tokens > 1 else 0
    return projections(module, span) + Cost(
        operations=span.tokens * (4 * states + within),
        exponentials=span.tokens * (2 * inner + 2 * shared + 2 * module.num_heads),
        numbers=2 * states,
    )


@cost.register
def s6(module: S6, span: Span) -> Cost:
    """A decay by an exponential for each number of the state."""
    states, inner = module.A_log.numel(), module.D.numel()
    return projections(module, span) + Cost(
        operations=2 * span.tokens * states, exponentials=span.tokens * (states + 3 * inner), numbers=2 * states
    )


@cost.register
def state_space(module: DiagonalStateSpace, span: Span) -> Cost:
    """The matrices of a chunk are made once, however long the text: they count for nothing."""
    channels, numbers = len(module.D), 2 * module.A_log.shape[1]
    within = 2 * min(CHUNK, span.tokens) if span.tokens > 1 else 0
    return Cost(operations=span.tokens * channels * (4 * numbers + within), numbers=4 * channels * numbers)


@cost.register
def h3(module: H3, span: Span) -> Cost:
    """A state space for each pair of a head, and a convolution over the last tokens."""
    pairs, (channels, taps) = module.head_dim**2, module.shift.weight.shape
    of_pairs = Span(span.tokens * pairs, span.before) if span.tokens > 1 else span
    shift = Cost(operations=2 * span.tokens * channels * taps, numbers=3 * channels * taps)
    return projections(module, span) + cost(module.state_space, of_pairs) + shift


@cost.register
def s4(module: S4D, span: Span) -> Cost:
    """A gelu of what the state space answers, a sigmoid in the gate."""
    smooth = Cost(exponentials=span.tokens * module.out_proj.out_features)
    return projections(module, span) + cost(module.state_space, span) + smooth


def projections(module: nn.Module, span: Span) -> Cost:
    """Of the Linear layers directly within a module."""
    return sum((linear(child, span) for child in module.children() if isinstance(child, nn.Linear)), Cost())


def on_paper(architecture, head: str, fields: dict) -> nn.Module:
    """A model without numbers, to be walked."""
    with torch.device("meta"):
        fields = fields | architecture.head_fields.get(head, {})
        return architecture.load(head)(architecture.load("Config")(**fields))


def floor_seconds(model: nn.Module, measure: str, length: int, rates: dict[str, float], number_bytes: int = 4) -> float:
    """The floor of one call of `measure` at the `rates` of a machine."""
    if measure in ("step", "generate"):
        step = cost(model, Span(1, before=length))
        products = max(step.operations / rates["matmul"], step.numbers * number_bytes / rates["bandwidth"])
        return products + step.exponentials / rates["exponential"]
    whole = cost(model, Span(length))
    # Backward takes each product's two gradients; its exponentials can be those of forward
    times = 3 if measure == "training" else 1
    return times * whole.operations / rates["matmul"] + whole.exponentials / rates["exponential"]
