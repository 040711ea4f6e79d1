"""What recurrences compute: registered with `costs.py`, a few lines for each mixer."""

import math

from hf_arch.bench.costs import CHUNK, Cost, Span, cost, projections
from hf_arch.modeling.layers.state_space import DiagonalStateSpace
from hf_arch.modeling.long_context.reformer.modeling_reformer import BlockAttention
from hf_arch.modeling.ops.delta_rule import DELTA_CHUNK
from hf_arch.modeling.state_space.h3.modeling_h3 import H3
from hf_arch.modeling.state_space.hyena.modeling_hyena import Hyena, ModalHyena
from hf_arch.modeling.state_space.retnet.modeling_retnet import MultiScaleRetention
from hf_arch.modeling.state_space.rwkv4.modeling_rwkv4 import RWKV4ChannelMixing, RWKV4TimeMixing
from hf_arch.modeling.state_space.rwkv7.modeling_rwkv7 import RWKV7ChannelMixing, RWKV7TimeMixing
from hf_arch.modeling.state_space.s4.modeling_s4 import S4D
from hf_arch.modeling.state_space.s6.modeling_s6 import S6
from hf_arch.modeling.state_space.ssd.modeling_ssd import SSD


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
def state_space(module: DiagonalStateSpace, span: Span) -> Cost:
    """The matrices of a chunk are made once, however long the text: they count for nothing."""
    channels, numbers = len(module.D), 2 * module.A_log.shape[1]
    within = 2 * min(CHUNK, span.tokens) if span.tokens > 1 else 0
    return Cost(operations=span.tokens * channels * (4 * numbers + within), numbers=4 * channels * numbers)


@cost.register
def blocks(module: BlockAttention, span: Span) -> Cost:
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


@cost.register
def s4(module: S4D, span: Span) -> Cost:
    """A gelu of what the state space answers, a sigmoid in the gate."""
    smooth = Cost(exponentials=span.tokens * module.out_proj.out_features)
    return projections(module, span) + cost(module.state_space, span) + smooth


@cost.register
def h3(module: H3, span: Span) -> Cost:
    """A state space for each pair of a head, and a convolution over the last tokens."""
    pairs, (channels, taps) = module.head_dim**2, module.shift.weight.shape
    of_pairs = Span(span.tokens * pairs, span.before) if span.tokens > 1 else span
    shift = Cost(operations=2 * span.tokens * channels * taps, numbers=3 * channels * taps)
    return projections(module, span) + cost(module.state_space, of_pairs) + shift


@cost.register
def s6(module: S6, span: Span) -> Cost:
    """A decay by an exponential for each number of the state."""
    states, inner = module.A_log.numel(), module.D.numel()
    return projections(module, span) + Cost(
        operations=2 * span.tokens * states, exponentials=span.tokens * (states + 3 * inner), numbers=2 * states
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
def rwkv4(module: RWKV4TimeMixing, span: Span) -> Cost:
    """A gate, and two weights for each token: one in what is read, one in its own output."""
    inner = module.time_decay.numel()
    return projections(module, span) + Cost(exponentials=3 * span.tokens * inner, numbers=6 * inner)


@cost.register
def rwkv4_channel_mixing(module: RWKV4ChannelMixing, span: Span) -> Cost:
    return projections(module, span) + Cost(exponentials=span.tokens * module.receptance.out_features)


@cost.register
def rwkv7(module: RWKV7TimeMixing, span: Span) -> Cost:
    """Scores of queries and a with keys and b, a triangular system, what is read of values and u; exponentials in the
    decays and their sums, the rates and the low ranks."""
    size, states = module.k_proj.out_features, module.r_k.numel() * module.r_k.shape[1]
    within = 2 * min(DELTA_CHUNK, span.tokens) * 8 * size if span.tokens > 1 else 0
    low_ranks = [part for part in (module.w, module.a, module.v, module.g) if part is not None]
    total = sum((projections(part, span) for part in low_ranks), projections(module, span))
    ranks = module.w.reduce_proj.out_features + module.g.reduce_proj.out_features
    return total + Cost(
        operations=span.tokens * (8 * states + within),
        exponentials=span.tokens * (4 * size + ranks),
        numbers=2 * states,
    )


@cost.register
def rwkv7_channel_mixing(module: RWKV7ChannelMixing, span: Span) -> Cost:
    return projections(module, span)


@cost.register
def hyena(module: Hyena, span: Span) -> Cost:
    """Filters are kept, and Fourier transforms of twice the text taken to be as quick as matrix products: 2.5 n log2 n
    operations each, two for a convolution. A step reads the history and the filter."""
    channels = module.out_proj.in_features * (module.order - 1)
    size = 2 * span.tokens
    transforms = 2 * 2.5 * size * math.log2(size) + 3 * size if span.tokens > 1 else 0
    read = 2 * span.before * channels if span.tokens == 1 else 0
    return projections(module, span) + Cost(operations=transforms * channels + read, numbers=read)


@cost.register
def modal_hyena(module: ModalHyena, span: Span) -> Cost:
    """As a chunked recurrence: a Toeplitz product in a chunk, a complex number per wave into it and out of it."""
    channels = module.out_proj.in_features * (module.order - 1)
    states = 2 * channels * module.filter.turn.shape[1]
    within = 2 * min(CHUNK, span.tokens) * channels if span.tokens > 1 else 0
    return projections(module, span) + Cost(operations=span.tokens * (4 * states + within), numbers=2 * states)
