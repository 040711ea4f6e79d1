"""What attention to some of a text computes: windows, patterns, blocks, segments, buckets."""

import torch

from hf_arch.bench.costs import Cost, Span, cost, linear, projections
from hf_arch.modeling.layers.pattern_attention import (
    DilatedAttention,
    FixedAttention,
    PatternAttention,
    StridedAttention,
)
from hf_arch.modeling.layers.retrieval_attention import RetrievalAttention
from hf_arch.modeling.long_context.bigbird.modeling_bigbird import BlockSparseAttention
from hf_arch.modeling.long_context.compressive_transformer.modeling_compressive_transformer import CompressiveRecurrence
from hf_arch.modeling.long_context.longformer.modeling_longformer import WindowAttention
from hf_arch.modeling.long_context.modeling_segment_recurrence import SegmentRecurrence
from hf_arch.modeling.long_context.reformer.modeling_reformer import BlockAttention
from hf_arch.modeling.long_context.routing_transformer.modeling_routing_transformer import Routing
from hf_arch.modeling.ops.compressed_memory import Rate
from hf_arch.modeling.ops.random_blocks import NOWHERE, BlockChoice
from hf_arch.modeling.ops.segment_rows import Window


def segment_pairs(window: Window, span: Span) -> int:
    """The same where a token sees its segment and a memory before it."""
    places = torch.arange(span.before, span.before + span.tokens)
    return int((places + 1 - window.first_seen(places)).sum())


def pattern_pairs(module: PatternAttention, span: Span) -> float:
    """The same of a pattern; of one that differs by head, on average."""
    place, config = torch.arange(span.before, span.before + span.tokens), module.config
    if isinstance(module, StridedAttention):
        seen = (place + 1).clamp(max=config.stride) + place // config.stride
    elif isinstance(module, FixedAttention):
        seen = place % config.stride + 1 + place // config.stride * config.summary_columns
    elif isinstance(module, DilatedAttention):
        sizes = zip(config.dilated_segments, config.dilations, strict=True)
        seen = sum((place % segment // dilation + 1) / dilation for segment, dilation in sizes)
    return seen.sum().item()


def block_pairs(choice: BlockChoice, size: int, span: Span) -> int:
    """The same where a token sees blocks of `size` tokens."""
    length = span.before + span.tokens
    count = -(-length // size)
    place, total = torch.arange(count), torch.full((count,), count)
    blocks = (choice.seen(place, total, count, layer=0) != NOWHERE).sum(1)
    token = torch.arange(span.before, length)
    if choice.causal:
        return int(((blocks[token // size] - 1) * size + token % size + 1).sum())
    blocks[(place < choice.first) | (place >= count - choice.last)] = count
    missing = count * size - length if choice.last else 0  # of the last block, which all see
    return int((blocks[token // size] * size - missing).clamp(max=length).sum())


def slot_pairs(rate: Rate, span: Span) -> int:
    """Pairs of a token and a slot of a compressed memory that it sees."""
    segments = torch.arange(span.before, span.before + span.tokens) // rate.tokens.segment
    return int((segments * rate.slots.segment - rate.missing).clamp(0, rate.reach).sum())


@cost.register
def pattern(module: PatternAttention, span: Span) -> Cost:
    pairs, heads = pattern_pairs(module, span), module.q_proj.out_features // module.head_dim
    read = pattern_pairs(module, Span(1, span.before + span.tokens - 1))
    return projections(module, span) + Cost(
        operations=4 * pairs * module.q_proj.out_features,
        exponentials=pairs * heads,
        numbers=read * (module.k_proj.out_features + module.v_proj.out_features),
    )


@cost.register
def retrieval(module: RetrievalAttention, span: Span) -> Cost:
    """Of each block that is over, a query reads two numbers in every channel, to choose the few whose keys it reads."""
    rule, size = module.rule, module.q_proj.out_features
    place = torch.arange(span.before, span.before + span.tokens)
    seen = (place + 1).clamp(max=rule.window + rule.sinks + rule.count * rule.block).sum().item()
    bounds = ((place + 1 - rule.window).clamp(min=0) / rule.block).ceil().sum().item()
    return projections(module, span) + Cost(
        operations=4 * (seen + bounds) * size,
        exponentials=seen * (size // module.head_dim),
        numbers=2 * (seen + bounds if span.tokens == 1 else span.before + span.tokens) * module.k_proj.out_features,
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
def blocks(module: BlockSparseAttention, span: Span) -> Cost:
    """Without tokens ahead of the text."""
    config, size = module.config, module.q_proj.out_features
    pairs = block_pairs(config.block_choice, config.block_size, span)
    return projections(module, span) + Cost(
        operations=4 * pairs * size,
        exponentials=pairs * (size // module.head_dim),
        numbers=2 * size * (pairs if span.tokens == 1 else span.before + span.tokens),
    )


@cost.register
def segment_recurrence(module: SegmentRecurrence, span: Span) -> Cost:
    """By content, by distance, and values; the keys of distances are made once for all texts."""
    pairs, keys = segment_pairs(module.window, span), min(span.before + span.tokens, module.window.span)
    size = module.q_proj.out_features
    return projections(module, span) + Cost(
        operations=6 * pairs * size, exponentials=pairs * module.num_heads, numbers=3 * keys * size
    )


@cost.register
def routing(module: Routing, span: Span) -> Cost:
    """A token sees its block and the one before: of local heads, of all tokens; of routed ones, of a cluster, which are
    taken to be of equal size. It is compared with all centroids."""
    heads, total = module.num_local_heads, projections(module, span)
    parts = [(heads, 1, module.local_window)] if heads else []
    if module.centroids is not None:
        routed, clusters, dim = module.centroids.value.shape
        total += Cost(operations=2 * span.tokens * routed * clusters * dim, numbers=routed * clusters * dim)
        parts.append((routed, clusters, module.cluster_size))
    for heads, clusters, size in parts:
        of_one = Span(-(-span.tokens // clusters), span.before // clusters)
        pairs = segment_pairs(Window(size // 2, size // 2), of_one) * span.tokens / of_one.tokens
        dim, keys = heads * module.head_dim, min(of_one.before + of_one.tokens, size)
        total += Cost(operations=4 * pairs * dim, exponentials=pairs * heads, numbers=2 * keys * dim)
    return total


@cost.register
def compressive_recurrence(module: CompressiveRecurrence, span: Span) -> Cost:
    """The same with slots, each made of `rate` tokens and projected. A step may be the one that makes some."""
    rate, width = module.rate, module.k_proj.out_features + module.v_proj.out_features
    made = rate.unit // rate.rate if span.tokens == 1 else span.tokens // rate.rate
    pairs, seen = slot_pairs(rate, span), min(slot_pairs(rate, Span(1, span.before + span.tokens)), rate.reach)
    seeing = Cost(
        operations=6 * pairs * module.q_proj.out_features,
        exponentials=pairs * module.num_heads,
        numbers=seen * 3 * width / 2,
    )
    making = cost(module.compression, Span(made)) + Cost(operations=2 * made * module.q_proj.in_features * width)
    return segment_recurrence(module, span) + seeing + making


@cost.register
def buckets(module: BlockAttention, span: Span) -> Cost:
    """A token sees its own block up to itself and the block before, of its bucket, in each round, a step all that is
    held of it; hashing turns each query by each rotation."""
    rotations = getattr(module, "rotations", None)
    rounds = 1 if rotations is None else rotations.shape[2]
    width = module.o_proj.in_features
    keys = rounds * (min(1.5 * module.block, span.tokens / 2) if span.tokens > 1 else 2 * module.block)
    hashing = 0 if rotations is None else 2 * rotations.numel()
    return projections(module, span) + Cost(
        operations=span.tokens * (4 * keys * width + hashing),
        exponentials=span.tokens * keys * module.num_heads,
        numbers=2 * keys * width + hashing / 2,
    )
