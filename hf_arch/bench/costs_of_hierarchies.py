"""What stages compute that shorten a text."""

import math

from hf_arch.bench.costs import Cost, Span, cost
from hf_arch.modeling.hierarchical.hnet.modeling_hnet import ArchHNetModel
from hf_arch.modeling.hierarchical.hourglass.modeling_hourglass import ArchHourglassModel, HourglassResampling
from hf_arch.modeling.skeleton.hierarchy import Hierarchy


def often(span: Span, tokens: float) -> float:
    """How often a pass reads anything of a level whose items are of so many `tokens`; a step, once for all of them."""
    return 1 / tokens if span.tokens == 1 else 1


def items(span: Span, tokens: float) -> Span:
    """The items of a level where there are some."""
    return Span(math.ceil(span.tokens / tokens), int(span.before // tokens))


def times(share: float, whole: Cost) -> Cost:
    return Cost(share * whole.operations, share * whole.exponentials, share * whole.numbers)


@cost.register
def hourglass(module: ArchHourglassModel, span: Span) -> Cost:
    return stages(module, module.config.shorten_factors, span)


@cost.register
def hnet(module: ArchHNetModel, span: Span) -> Cost:
    """Where chunks are as long as the ratio loss asks them to be."""
    return stages(module, module.config.target_ratios, span)


def stages(module: Hierarchy, factors: list[float], span: Span) -> Cost:
    """Of a model in which so many items of a level are one of the next."""
    total = Cost()
    for layer, level in zip(module.layers, module.config.layer_levels, strict=True):
        tokens = math.prod(factors[:level])
        total += times(often(span, tokens), cost(layer, items(span, tokens)))
    for level, resampling in enumerate(module.resamplings):
        tokens = math.prod(factors[:level])
        total += times(often(span, tokens), cost(resampling, items(span, tokens)))
    return total


@cost.register
def resampling(module: HourglassResampling, span: Span) -> Cost:
    """The keys and values of a group are made when it is complete."""
    share, shorter = often(span, module.factor), items(span, module.factor)
    total = times(share, cost(module.pool, shorter))
    if module.attends:
        group, down = Span(shorter.tokens * module.factor), module.down_attention
        parts = [cost(down.q_proj, shorter), cost(down.o_proj, shorter), cost(module.up_attention, shorter)]
        parts += [cost(down.k_proj, group), cost(down.v_proj, group), cost(module.down_feed_forward, shorter)]
        total += times(share, sum(parts, Cost())) + cost(module.up_feed_forward, span)
    return total
