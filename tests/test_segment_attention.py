"""Attention to a segment and the memory before it: blocks equal the definition, which equals the paper's words."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recurrences import some_documents
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hf_arch.bench.worker.serve import ON_CPU
from hf_arch.modeling.ops import segment_attention
from hf_arch.modeling.ops.segment_attention import block_segment_attention, dense_segment_attention
from hf_arch.modeling.ops.segment_rows import SegmentState, Window

EXACT = {"atol": 1e-11, "rtol": 1e-10}
WINDOWS = [Window(16, 16), Window(16, 40), Window(20, 7), Window(16, 9, True), Window(7, 30, True), Window(1, 1)]


def some_tensors(length, window, heads=3, dim=4, batch=2):
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, length, heads, dim)] * 4 + [(window.span, heads, dim)]
    return [2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def some_state(window, read=(3, 90), heads=3, dim=4):
    """Of two rows, of which one may have read less than there is room for."""
    generator = torch.Generator().manual_seed(5)
    key, value = torch.randn(2, 2, window.held, heads, dim, generator=generator, dtype=torch.float64)
    there = torch.arange(window.held, 0, -1) <= torch.tensor(read)[:, None]
    return SegmentState(key * there[..., None, None], value * there[..., None, None], torch.tensor(read))


def naive(content, distance, key, value, relative, window):
    """One token at a time, in the words of the docstring."""
    outputs = torch.zeros_like(content)
    for i in range(content.shape[1]):
        first = i - window.memory if window.same_length else window.segment * (i // window.segment) - window.memory
        seen = range(max(0, first), i + 1)
        scores = torch.stack(
            [(content[:, i] * key[:, j]).sum(-1) + (distance[:, i] * relative[i - j]).sum(-1) for j in seen]
        )
        weights = (scores / content.shape[-1] ** 0.5).softmax(0)
        outputs[:, i] = sum(weight[..., None] * value[:, j] for weight, j in zip(weights, seen, strict=True))
    return outputs


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_the_definition_is_the_papers(window):
    tensors = some_tensors(37, window)
    assert_close(dense_segment_attention(*tensors, window)[0], naive(*tensors, window), **EXACT)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 70])
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_blocks_equal_the_definition(window, length, resumed, packed, monkeypatch):
    monkeypatch.setattr(segment_attention, "QUERIES", 5)
    monkeypatch.setattr(segment_attention, "ROOM", 2000)
    tensors = some_tensors(length, window)
    documents = some_documents(length) if packed else None
    told = {"documents": documents, "output_final_state": True}
    told["initial_state"] = some_state(window) if resumed else None
    expected, expected_state = dense_segment_attention(*tensors, window, **told)
    output, state = block_segment_attention(*tensors, window, **told)
    real = slice(None) if documents is None else documents > 0
    assert_close(output[real], expected[real], **EXACT)
    assert_close(tuple(state), tuple(expected_state), **EXACT)


@settings(max_examples=40, deadline=None)
@given(length=st.integers(2, 80), cut=st.integers(1, 79), seed=st.integers(0, 99), window=st.sampled_from(WINDOWS))
@torch.no_grad()
def test_any_cut_gives_the_same(length, cut, seed, window):
    *tensors, relative = some_tensors(length, window)
    documents, cut = some_documents(length, seed), min(cut, length - 1)
    expected, expected_state = dense_segment_attention(
        *tensors, relative, window, documents=documents, output_final_state=True
    )
    before = documents[:, :cut].cummax(1).values[:, -1:].clamp(min=1)
    later = (documents[:, cut:] - before + 1).clamp(min=0) * (documents[:, cut:] > 0)
    told = {"output_final_state": True}
    first, state = block_segment_attention(
        *(x[:, :cut] for x in tensors), relative, window, documents=documents[:, :cut], **told
    )
    second, state = block_segment_attention(
        *(x[:, cut:] for x in tensors), relative, window, documents=later, initial_state=state, **told
    )
    real = documents > 0
    assert_close(torch.cat((first, second), dim=1)[real], expected[real], **EXACT)
    assert_close(tuple(state), tuple(expected_state), **EXACT)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_gradients_of_the_two_forms_are_equal(window, packed, resumed):
    tensors = [x.requires_grad_() for x in some_tensors(50, window)]
    still = [x.requires_grad_() for x in some_tensors(50, window)[2:4]]
    documents = some_documents(50) if packed else None
    told = {"documents": documents, "still": still, "initial_state": some_state(window) if resumed else None}
    found = []
    for form in (dense_segment_attention, block_segment_attention):
        output, _ = form(*tensors, window, **told)
        weight = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
        weight = weight if documents is None else weight * (documents > 0)[..., None, None]
        found.append(torch.autograd.grad((output * weight).sum(), (*tensors, *still)))
    for expected, gradient in zip(*found, strict=True):
        assert_close(gradient, expected, atol=1e-9, rtol=1e-8)


@torch.no_grad()
def test_a_memory_of_the_whole_text_is_full_attention():
    tensors = some_tensors(48, Window(16, 32))
    one_segment, _ = dense_segment_attention(*tensors, Window(48, 0))
    assert_close(block_segment_attention(*tensors, Window(16, 32))[0], one_segment, **EXACT)


@pytest.mark.parametrize("window", [Window(32, 32), Window(32, 32, True)], ids=str)
@torch.no_grad()
def test_work_and_the_largest_tensor_do_not_grow_faster_than_the_length(window):
    def work(length):
        with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
            block_segment_attention(*some_tensors(length, window), window)
        return counter.get_total_flops()

    assert work(4096) == pytest.approx(8 * work(512), rel=0.01)
