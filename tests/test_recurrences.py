"""Every op with a state: its parallel form equals its definition, over lengths, chunk edges, padding, packed documents
and resumed states, and so do their gradients."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_arch.modeling.ops import dispatch
from hf_arch.modeling.ops.bucketed_attention import bucketed_attention, recurrent_bucketed_attention
from hf_arch.modeling.ops.convolution import causal_convolution, chunk_convolution, recurrent_convolution
from hf_arch.modeling.ops.decayed_attention import chunk_decayed_attention, recurrent_decayed_attention
from hf_arch.modeling.ops.delta_rule import chunk_delta_rule, recurrent_delta_rule
from hf_arch.modeling.ops.diagonal_state_space import chunk_diagonal_state_space, recurrent_diagonal_state_space
from hf_arch.modeling.ops.linear_attention import chunk_linear_attention, recurrent_linear_attention
from hf_arch.modeling.ops.long_convolution import long_convolution, recurrent_long_convolution
from hf_arch.modeling.ops.low_rank_state_space import chunk_low_rank_state_space, recurrent_low_rank_state_space
from hf_arch.modeling.ops.retention import chunk_retention, recurrent_retention
from hf_arch.modeling.ops.selective_scan import chunk_selective_scan, recurrent_selective_scan
from hf_arch.modeling.ops.smoothing import chunk_smoothing, recurrent_smoothing
from hf_arch.modeling.ops.token_shift import recurrent_token_shift, token_shift
from hf_arch.modeling.ops.wkv import chunk_wkv, recurrent_wkv

BATCH = 2


@dataclass(frozen=True)
class Op:
    definition: Callable
    parallel: Callable
    shapes: tuple[tuple[int, ...], ...]  # of the tensors [batch, length, ...], without these two
    state: tuple[int, ...]
    fixed: dict[int, tuple[int, ...]] = field(default_factory=dict)  # place -> shape, of those that are no sequences
    signs: dict[int, int] = field(default_factory=dict)  # of the tensors that are nowhere negative, or positive
    small: tuple[int, ...] = ()  # the tensors that a state is multiplied by, so that it stays bounded
    decays: int | None = None  # the tensor of which a larger number forgets faster

    def tensors(self, length: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(length)
        shapes = [(BATCH, length, *shape) for shape in self.shapes]
        for place, shape in self.fixed.items():
            shapes.insert(place, shape)
        made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        made = [0.2 * x if n in self.small else x for n, x in enumerate(made)]
        return [(self.signs[n] * x.abs() if n in self.signs else x).to(dtype) for n, x in enumerate(made)]

    def cut(self, tensors: list[torch.Tensor], part: slice) -> list[torch.Tensor]:
        return [x if n in self.fixed else x[:, part] for n, x in enumerate(tensors)]


def of_rates(form: Callable) -> Callable:
    """A moving average by real tensors: rates are more than 0 and less than 1."""
    return lambda value, rate, **options: form(value, rate.sigmoid(), **options)


def of_numbers(form: Callable) -> Callable:
    """A state space by real tensors: the logarithms and angles of its decays, complex numbers as pairs."""

    def call(x, log_decay, angle, readout, skip, **options):
        return form(x, torch.polar(log_decay.exp(), angle), torch.view_as_complex(readout), skip, **options)

    return call


def of_pairs(form: Callable) -> Callable:
    """The same of one whose numbers are complex."""

    def call(x, step, real, imaginary, *pairs_and_skip, **options):
        *pairs, skip = pairs_and_skip
        return form(x, step, torch.complex(real, imaginary), *map(torch.view_as_complex, pairs), skip, **options)

    return call


def with_skip(form: Callable) -> Callable:
    """An op whose skip comes by position, as its other tensors do."""

    def call(*tensors_and_skip, chunk_size=64, **options):
        *tensors, skip = tensors_and_skip
        chunks = {"chunk_size": chunk_size} if "chunk_size" in inspect.signature(form).parameters else {}
        return form(*tensors, skip=skip, **chunks, **options)

    return call


def of_buckets(form: Callable) -> Callable:
    """Attention in blocks of 4 within 3 buckets, by two rounds: a bucket is the greatest of three numbers. The state as
    one tensor, with the numbers of tokens beside what was remembered of them."""

    def call(query, key, value, signs, initial_state=None, **options):
        if initial_state is not None:
            count = (initial_state[..., 0, -1].abs() * 9).round().long()
            held = torch.arange(8) < count[..., None]
            initial_state = initial_state[..., :-1] * held[..., None], count
        told = {"num_buckets": 3, "block": 4, "sees_itself": False, "initial_state": initial_state}
        output, (store, count) = form(query, key, value, signs.argmax(-1), **told, **options)
        output = output + 0 * signs.sum()  # a choice has no gradient
        return output, torch.cat((store, count[..., None, None].expand(*store.shape[:-1], 1) / 9), dim=-1)

    return call


OPS = {
    "bucketed_attention": Op(
        of_buckets(recurrent_bucketed_attention),
        of_buckets(bucketed_attention),
        ((3, 6), (3, 6), (3, 5), (3, 2, 3)),
        (3, 2, 3, 8, 12),
    ),
    "diagonal_state_space": Op(
        of_numbers(recurrent_diagonal_state_space),
        of_numbers(chunk_diagonal_state_space),
        ((6,),),
        (6, 4, 2),
        fixed={1: (6, 4), 2: (6, 4), 3: (1, 6, 4, 2), 4: (6,)},
        signs={1: -1},
        decays=1,
    ),
    "low_rank_state_space": Op(
        of_pairs(recurrent_low_rank_state_space),
        of_pairs(chunk_low_rank_state_space),
        ((6,),),
        (6, 4, 2),
        fixed={1: (6,), 2: (6, 4), 3: (6, 4), 4: (6, 4, 2), 5: (6, 4, 2), 6: (1, 6, 4, 2), 7: (6,)},
        signs={1: 1, 2: -1},
        decays=2,
    ),
    "retention": Op(recurrent_retention, chunk_retention, ((3, 8), (3, 8), (3, 16)), (3, 8, 16)),
    "decayed_attention": Op(
        with_skip(recurrent_decayed_attention),
        with_skip(chunk_decayed_attention),
        ((2, 8), (2, 8), (6, 5), (6,), (6,)),
        (6, 8, 5),
        fixed={5: (6,)},
        signs={3: -1},
        decays=3,
    ),
    "smoothing": Op(of_rates(recurrent_smoothing), of_rates(chunk_smoothing), ((5,), ()), (5,)),
    "linear_attention": Op(
        recurrent_linear_attention,
        chunk_linear_attention,
        ((3, 8), (3, 8), (3, 5), (3,)),
        (3, 8, 7),
        signs={0: 1, 1: 1},
    ),
    "delta_rule": Op(
        recurrent_delta_rule,
        chunk_delta_rule,
        ((3, 8), (3, 8), (3, 8), (3, 5), (3, 8), (3, 8)),
        (3, 8, 5),
        signs={1: -1},
        small=(4, 5),
        decays=1,
    ),
    "selective_scan": Op(
        recurrent_selective_scan,
        chunk_selective_scan,
        ((6,), (6,), (5,), (5,)),
        (5, 6),
        fixed={2: (5, 6)},
        signs={1: 1, 2: -1},
        decays=2,
    ),
    "long_convolution": Op(recurrent_long_convolution, long_convolution, ((6,),), (6, 39), fixed={1: (6, 90)}),
    "wkv": Op(recurrent_wkv, chunk_wkv, ((6,), (6,)), (3, 6), fixed={2: (6,), 3: (6,)}, signs={2: -1}, decays=2),
    "token_shift": Op(recurrent_token_shift, token_shift, ((6,),), (1, 6)),
    "convolution": Op(recurrent_convolution, causal_convolution, ((6,),), (3, 6), fixed={1: (6, 4), 2: (6,)}),
    "convolution of many": Op(recurrent_convolution, chunk_convolution, ((6,),), (40, 6), fixed={1: (6, 41), 2: (6,)}),
    "convolution of more": Op(recurrent_convolution, chunk_convolution, ((6,),), (76, 6), fixed={1: (6, 77), 2: (6,)}),
}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
EXACT = {"atol": 1e-11, "rtol": 1e-10}


def some_documents(length: int, seed: int = 7) -> torch.Tensor:
    """Padding anywhere, a new document now and then."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.rand(BATCH, length, generator=generator) > 0.2
    return ((torch.rand(BATCH, length, generator=generator) < 0.05).cumsum(1) + 1) * real


@every_op
@pytest.mark.parametrize("length", [1, 2, 16, 17, 63, 64, 65, 130, 257])
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_parallel_form_equals_the_definition(op, length, resumed, packed):
    tensors, generator = op.tensors(length), torch.Generator().manual_seed(3)
    state = torch.randn(BATCH, *op.state, dtype=torch.float64, generator=generator) if resumed else None
    documents = some_documents(length) if packed else None
    options = {"initial_state": state, "output_final_state": True, "documents": documents}
    expected, expected_state = op.definition(*tensors, **options)
    output, final_state = op.parallel(*tensors, **options)
    real = slice(None) if documents is None else documents > 0
    assert_close(output[real], expected[real], **EXACT)
    assert_close(final_state, expected_state, **EXACT)


@every_op
@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 90), chunk_size=st.integers(1, 40), cut=st.integers(0, 90), seed=st.integers(0, 99))
def test_any_chunk_size_and_any_cut_give_the_same(op, length, chunk_size, cut, seed):
    tensors, cut, documents = op.tensors(length), min(cut, length), some_documents(length, seed)
    expected, expected_state = op.definition(*tensors, documents=documents, output_final_state=True)
    options = {"chunk_size": chunk_size} if "chunk_size" in inspect.signature(op.parallel).parameters else {}
    state, outputs = None, []
    for part in (slice(None, cut), slice(cut, None)):
        rows, numbers = op.cut(tensors, part), documents[:, part]
        if not numbers.shape[1]:
            continue
        if part.start:  # an initial state belongs to document 1: the number goes on where the document does
            before = documents[:, :cut].cummax(1).values[:, -1:].clamp(min=1)
            numbers = (numbers - before + 1).clamp(min=0) * (numbers > 0)
        output, state = op.parallel(*rows, documents=numbers, initial_state=state, output_final_state=True, **options)
        outputs.append(output)
    real = documents > 0
    assert_close(torch.cat(outputs, dim=1)[real], expected[real], **EXACT)
    assert_close(state, expected_state, **EXACT)


@every_op
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_the_two_forms_are_equal(op, packed):
    tensors = [x.requires_grad_() for x in op.tensors(70)]
    documents = some_documents(70) if packed else None
    found = []
    for form in (op.definition, op.parallel):
        output, state = form(*tensors, documents=documents, output_final_state=True)
        weight = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
        weight = weight if documents is None else weight * (documents > 0).view(BATCH, 70, *(1,) * (output.ndim - 2))
        found.append(torch.autograd.grad((output * weight).sum() + state.square().sum(), tensors))
    for expected, gradient in zip(*found, strict=True):
        assert_close(gradient, expected, atol=1e-9, rtol=1e-8)


@every_op
@pytest.mark.parametrize("far", [1e-30, 300.0])
def test_extreme_decays_are_no_trouble(op, far):
    """A memory that never fades, and one that is gone at once."""
    tensors = op.tensors(130, torch.float32)
    if op.decays is not None:
        tensors[op.decays] = torch.full_like(tensors[op.decays], far * op.signs[op.decays]).requires_grad_()
    output, state = op.parallel(*tensors, output_final_state=True)
    expected, expected_state = op.definition(*tensors, output_final_state=True)
    assert_close(output, expected, atol=1e-3, rtol=1e-4)
    assert_close(state, expected_state, atol=1e-3, rtol=1e-4)
    if op.decays is not None:
        assert torch.autograd.grad(output.sum(), tensors[op.decays])[0].isfinite().all()


@pytest.mark.parametrize("length", [1, 31, 65])
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_compiled_gives_the_same(length, packed, monkeypatch):
    """Uncompiled here: a compiler takes its time."""
    op, documents = OPS["selective_scan"], some_documents(length) if packed else None
    tensors = [x.requires_grad_() for x in op.tensors(length)]
    state = torch.randn(BATCH, *op.state, dtype=torch.float64)

    def answer():
        output, last = op.parallel(*tensors, initial_state=state, documents=documents, output_final_state=True)
        return output, last, *torch.autograd.grad(output.square().sum() + last.square().sum(), tensors)

    expected, made = answer(), []
    monkeypatch.setenv("HF_ARCH_COMPILE", "1")
    monkeypatch.setattr(dispatch, "can_compile", lambda: True)
    monkeypatch.setattr(dispatch, "machine_code", lambda function: made.append(function) or function)
    assert_close(answer(), expected, atol=1e-10, rtol=1e-9)
    assert made


def test_where_nothing_can_be_compiled_a_warning_says_so(monkeypatch):
    def fails(function):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setenv("HF_ARCH_COMPILE", "1")
    monkeypatch.setattr(torch, "compile", fails)
    dispatch.can_compile.cache_clear()
    with pytest.warns(UserWarning, match="No working C"):
        assert dispatch.compiled(print, torch.zeros(1)) is None
    dispatch.can_compile.cache_clear()
