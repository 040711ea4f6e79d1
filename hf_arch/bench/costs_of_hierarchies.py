"""What stages compute that shorten a text."""

import math

from hf_arch.bench.costs import Cost, Span, cost, linear, projections, visible_pairs
from hf_arch.bench.worker.subject import ANSWER
from hf_arch.modeling.hierarchical.hnet.modeling_hnet import ArchHNetModel
from hf_arch.modeling.hierarchical.hourglass.modeling_hourglass import ArchHourglassModel, HourglassResampling
from hf_arch.modeling.hierarchical.megabyte.modeling_megabyte import ArchMegaByteModel, MegaByteResampling
from hf_arch.modeling.layers.hierarchical_cross_attention import HierarchicalCrossAttention
from hf_arch.modeling.layers.patch_attention import PatchAttention
from hf_arch.modeling.skeleton.conditional_generation import ConditionalGeneration
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
def megabyte(module: ArchMegaByteModel, span: Span) -> Cost:
    return stages(module, module.config.patch_sizes, span)


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


@cost.register
def of_patches(module: MegaByteResampling, span: Span) -> Cost:
    """Each item of a patch is told its part of the answer, all when the patch begins."""
    patches = items(span, module.patch_size)
    told = cost(module.answer_proj, Span(patches.tokens * module.patch_size))
    return times(often(span, module.patch_size), told)


@cost.register
def within_patches(module: PatchAttention, span: Span) -> Cost:
    size = module.config.patch_size
    if span.tokens == 1:
        pairs = visible_pairs(Span(1, span.before % size))
    else:
        whole, rest = divmod(span.tokens, size)
        pairs = whole * visible_pairs(Span(size)) + visible_pairs(Span(rest))
    width = module.q_proj.out_features
    return projections(module, span) + Cost(
        operations=4 * pairs * width,
        exponentials=pairs * width // module.head_dim,
        numbers=size * (module.k_proj.out_features + module.v_proj.out_features),
    )


@cost.register
def reading_and_answering(module: ConditionalGeneration, span: Span) -> Cost:
    """A pass reads a source of so many tokens and names ANSWER; a step names one after a source that was read."""
    encoder, decoder, config = module.model.encoder, module.model.decoder, module.config
    answer, source = (Span(1), span.before) if span.before else (Span(ANSWER), span.tokens)
    total = linear(module.lm_head, answer) + (Cost() if span.before else cost(encoder, span))
    of_source = math.ceil(source / config.segment_lengths[0]), config.segment_lengths[0]
    for group in decoder.config.layer_groups:
        parts = decoder.layers[group].sublayers
        total += answer_from(parts["cross_attention"], answer, *of_source, made=not span.before)
        total += cost(parts["mixer"], answer) + cost(parts["feed_forward"], answer)
    return total


def answer_from(module: HierarchicalCrossAttention, answer: Span, segments: int, longest: int, made: bool) -> Cost:
    """Tokens of an answer that weigh all segments of a source and attend to those that they choose; the keys and
    values of the source are made in the same pass, or were before."""
    size, of_keys = module.q_proj.out_features, module.k_proj.out_features
    heads, seen = size // module.head_dim, min(module.count, segments) * longest
    total = sum((linear(part, answer) for part in (module.q_proj, module.segment_q_proj, module.o_proj)), Cost())
    if made:
        total += linear(module.k_proj, Span(segments * longest)) + linear(module.v_proj, Span(segments * longest))
        total += linear(module.segment_k_proj, Span(segments))
    return total + Cost(
        operations=answer.tokens * (2 * segments + 4 * seen) * size,
        exponentials=answer.tokens * seen * heads,
        numbers=(segments + 2 * seen) * of_keys,
    )
