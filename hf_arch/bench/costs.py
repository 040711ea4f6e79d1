"""What a model computes: matrix products and exponentials, and the numbers it has to read.

`cost` walks the modules of a model; a new mixer or feed-forward registers what it computes beside its Linear layers: a
recurrence in `costs_of_recurrences.py`, attention to some of a text in `costs_of_long_context.py`, stages in
`costs_of_hierarchies.py`.
"""

import math
from dataclasses import dataclass
from functools import singledispatch
from typing import NamedTuple

from torch import nn

from hf_arch.modeling.hierarchical.hat.modeling_hat import ArchHatModel
from hf_arch.modeling.layers.attention import Attention, CrossAttention
from hf_arch.modeling.layers.attention_pooling import AttentionPooling
from hf_arch.modeling.layers.feed_forward import MLP
from hf_arch.modeling.layers.gated_recurrence import BidirectionalGRU
from hf_arch.modeling.layers.latent_attention import LatentAttention
from hf_arch.modeling.layers.mixer import Mixer
from hf_arch.modeling.layers.routed_view import RoutedView
from hf_arch.modeling.layers.routers import SoftRouter
from hf_arch.modeling.layers.sparse import MixtureOfExperts
from hf_arch.modeling.moe.deepseek.sparse_deepseek import DeepSeekFeedForward
from hf_arch.modeling.ops.latent_attention import absorbing_is_less_work
from hf_arch.modeling.skeleton.backbone import Backbone, Layer

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
        raise TypeError(f"bench knows no cost of {type(module).__name__}: register one.")
    return sum((cost(child, span) for child in module.children()), Cost())


@cost.register
def linear(module: nn.Linear, span: Span) -> Cost:
    return Cost(operations=2 * module.weight.numel() * span.tokens, numbers=module.weight.numel())


@cost.register
def backbone(module: Backbone, span: Span) -> Cost:
    """Layers that share their weights are as much work as others."""
    return sum((cost(module.layers[group], span) for group in module.config.layer_groups), Cost())


@cost.register
def routed(module: Layer, span: Span) -> Cost:
    """A layer that works on a share of the tokens, as many as in training; who does not, works on all."""
    share = module.view.capacity if isinstance(module.view, RoutedView) else 1
    inside = Span(math.ceil(share * span.tokens), math.ceil(share * span.before))
    parts = (cost(part, inside) for part in (module.residual, *module.sublayers.values()))
    return sum(parts, cost(module.view, span))


@cost.register
def hierarchy(module: ArchHatModel, span: Span) -> Cost:
    """Each layer works at its level, a segment at a time."""
    config, total = module.config, Cost()
    for group, kind in zip(config.layer_groups, config.layer_types, strict=True):
        part, level = config.part_and_level(kind)
        length = config.level_lengths[level]
        whole, rest = divmod(math.ceil(span.tokens / math.prod(config.level_lengths[:level])), length)
        for members, segments in ((length, whole), (rest, 1 if rest else 0)):
            below = members * math.prod(config.level_lengths[:level])
            told = {"pool": Span(1, members), "down": Span(below, members)}.get(part, Span(members))
            total = sum([cost(module.layers[group], told)] * segments, total)
    return total


@cost.register
def cross_attention(module: CrossAttention, span: Span) -> Cost:
    """Tokens that ask as many others as the span says were before."""
    size, kept = module.q_proj.out_features, module.k_proj.weight.numel() + module.v_proj.weight.numel()
    asked = linear(module.q_proj, span) + linear(module.o_proj, span)
    pairs, heads = span.tokens * span.before, size // module.head_dim
    return asked + Cost(2 * kept * span.before + 4 * pairs * size, pairs * heads, kept)


@cost.register
def attention_pooling(module: AttentionPooling, span: Span) -> Cost:
    size = module.in_proj.out_features
    made = linear(module.in_proj, Span(span.before))
    return made + Cost(4 * span.before * size, span.before * (size + 1))


@cost.register
def bidirectional_gru(module: BidirectionalGRU, span: Span) -> Cost:
    numbers = module.state_weight.numel()
    made = Cost(2 * numbers * span.tokens, 3 * module.in_proj.out_features // 6 * 2 * span.tokens, numbers)
    return linear(module.in_proj, span) + made


@cost.register
def feed_forward(module: MLP, span: Span) -> Cost:
    """An exponential for each number that a smooth activation (silu, gelu, tanh, ...) is applied to."""
    smooth = 0 if isinstance(module.act_fn, nn.ReLU) else module.up_proj.out_features
    return projections(module, span) + Cost(exponentials=smooth * span.tokens)


@cost.register
def experts(module: MixtureOfExperts, span: Span) -> Cost:
    """Of weights, those of as many experts as so few tokens can ask for."""
    made, computed = module.experts, module.evaluations(span.tokens)
    of_one = made.first_proj[0].numel() + made.down_proj[0].numel()
    smooth = 0 if isinstance(made.act_fn, nn.ReLU) else made.down_proj.shape[-1]
    return cost(module.router, span) + Cost(
        operations=2 * of_one * computed,
        exponentials=smooth * computed,
        numbers=of_one * min(computed, made.num_experts),
    )


@cost.register
def soft_routes(module: SoftRouter, span: Span) -> Cost:
    """Likenesses of tokens and slots, and the means that both are given of each other."""
    return Cost(
        operations=3 * 2 * module.phi.numel() * span.tokens,
        exponentials=2 * len(module.phi) * span.tokens,
        numbers=module.phi.numel(),
    )


@cost.register
def experts_and_shared(module: DeepSeekFeedForward, span: Span) -> Cost:
    shared = module.shared_experts
    return experts(module, span) + (Cost() if shared is None else cost(shared, span))


@cost.register
def latent_attention(module: LatentAttention, span: Span) -> Cost:
    """Queries and what is made of the tokens; where few ask, scores of latents, else keys and values of all tokens."""
    pairs, keys = visible_pairs(span), span.before + span.tokens
    heads, rank = module.o_proj.in_features // module.dim, module.expansion.rank
    widths, expanded = 2 * rank + module.rope, span
    if not absorbing_is_less_work(span.tokens, keys, module.nope, module.dim):
        widths, expanded = module.nope + module.rope + module.dim, Span(keys)
    made = sum((cost(part, span) for part in (module.query, module.kv_a_proj, module.o_proj)), Cost())
    return (
        made
        + cost(module.expansion, expanded)
        + Cost(
            operations=2 * pairs * heads * widths,
            exponentials=pairs * heads,
            numbers=keys * (rank + module.rope),
        )
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


def projections(module: nn.Module, span: Span) -> Cost:
    """Of the Linear layers directly within a module."""
    return sum((linear(child, span) for child in module.children() if isinstance(child, nn.Linear)), Cost())
