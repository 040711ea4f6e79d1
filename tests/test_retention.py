"""The op: its parallel form equals its definition, over lengths, chunk edges, dtypes, padding and resumed states."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_arch.modeling.ops.dispatch import on_packed_rows
from hf_arch.modeling.ops.retention import chunk_retention, recurrent_retention, retention_decay


def some_inputs(length, dtype=torch.float64, batch=2, heads=3):
    generator = torch.Generator().manual_seed(length)
    query, key = torch.randn(2, batch, length, heads, 8, generator=generator, dtype=dtype)
    return query, key, torch.randn(batch, length, heads, 16, generator=generator, dtype=dtype)


def some_documents(length, generator, batch=2):
    real = torch.rand(batch, length, generator=generator) > 0.2
    return ((torch.rand(batch, length, generator=generator) < 0.05).cumsum(1) + 1) * real


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130, 257])
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_chunked_equals_recurrent(length, resumed, packed):
    inputs, generator = some_inputs(length), torch.Generator().manual_seed(7)
    state = torch.randn(2, 3, 8, 16, dtype=torch.float64, generator=generator) if resumed else None
    documents = some_documents(length, generator) if packed else None
    options = {"initial_state": state, "output_final_state": True, "documents": documents}
    expected, expected_state = recurrent_retention(*inputs, **options)
    output, final_state = chunk_retention(*inputs, **options)
    real = slice(None) if documents is None else documents > 0
    assert_close(output[real], expected[real], atol=1e-12, rtol=1e-10)
    assert_close(final_state, expected_state, atol=1e-12, rtol=1e-10)


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 90), chunk_size=st.integers(1, 40), cut=st.integers(0, 90), seed=st.integers(0, 99))
def test_any_chunk_size_and_any_cut_give_the_same(length, chunk_size, cut, seed):
    inputs, cut = some_inputs(length), min(cut, length)
    documents = some_documents(length, torch.Generator().manual_seed(seed))
    expected, expected_state = recurrent_retention(*inputs, documents=documents, output_final_state=True)
    state, outputs = None, []
    for part in (slice(None, cut), slice(cut, None)):
        rows = [x[:, part] for x in inputs]
        if rows[0].shape[1]:
            numbers = documents[:, part]
            if part.start:  # an initial state belongs to document 1: the number goes on where the document does
                before = documents[:, :cut].cummax(1).values[:, -1:].clamp(min=1)
                numbers = (numbers - before + 1).clamp(min=0) * (numbers > 0)
            output, state = chunk_retention(
                *rows, documents=numbers, initial_state=state, output_final_state=True, chunk_size=chunk_size
            )
            outputs.append(output)
    real = documents > 0
    assert_close(torch.cat(outputs, dim=1)[real], expected[real], atol=1e-12, rtol=1e-10)
    assert_close(state, expected_state, atol=1e-12, rtol=1e-10)


def test_gradients_of_the_two_forms_are_equal():
    inputs = [x.requires_grad_() for x in some_inputs(70)]
    documents = some_documents(70, torch.Generator().manual_seed(3))
    weight = torch.randn(2, 70, 3, 16, dtype=torch.float64) * (documents > 0)[..., None, None]
    found = []
    for retain in (recurrent_retention, chunk_retention):
        output, state = retain(*inputs, documents=documents, output_final_state=True)
        found.append(torch.autograd.grad((output * weight).sum() + state.sum(), inputs))
    for left, right in zip(*found, strict=True):
        assert_close(left, right, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_states_are_wide_and_answers_as_narrow_as_the_values(dtype):
    inputs = some_inputs(130, dtype)
    expected, expected_state = recurrent_retention(*(x.double() for x in inputs), output_final_state=True)
    for retain in (recurrent_retention, chunk_retention):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
            output, state = retain(*inputs, output_final_state=True)
        assert state.dtype == torch.float32 and output.dtype == dtype
        assert_close(state.double(), expected_state, atol=1e-4, rtol=1e-4)
        assert_close(output.double(), expected, atol=torch.finfo(dtype).eps * 100, rtol=torch.finfo(dtype).eps * 2)


def test_the_rates_are_the_papers():
    assert_close(retention_decay(3, "cpu", torch.float64), 1 - 2.0 ** -torch.arange(5, 8).double())


def test_a_kernel_that_knows_only_cu_seqlens_gives_the_same():
    """The translation for GPU kernels, with a stand-in that works like them: one row, a state per document."""

    def kernel(query, key, value, *, initial_state, output_final_state, cu_seqlens=None):
        assert len(query) == 1 or cu_seqlens is None
        bounds, outputs, states = cu_seqlens.tolist(), [], []
        for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            state = None if initial_state is None else initial_state[i : i + 1]
            piece = (x[:, start:end] for x in (query, key, value))
            output, state = recurrent_retention(*piece, initial_state=state, output_final_state=True)
            outputs.append(output)
            states.append(state)
        return torch.cat(outputs, dim=1), torch.cat(states) if output_final_state else None

    inputs, generator = some_inputs(50, batch=3), torch.Generator().manual_seed(5)
    documents = some_documents(50, generator, batch=3)
    documents[1] = 0  # a row of nothing but padding keeps its state
    documents[:, 0] = torch.tensor([1, 0, 1])
    for state in (None, torch.randn(3, 3, 8, 16, dtype=torch.float64, generator=generator)):
        options = {"documents": documents, "initial_state": state, "output_final_state": True}
        expected, expected_state = recurrent_retention(*inputs, **options)
        output, final_state = on_packed_rows(kernel, *inputs, **options)
        assert_close(output, expected * (documents > 0)[..., None, None], atol=1e-12, rtol=1e-10)
        assert_close(final_state, expected_state, atol=1e-12, rtol=1e-10)
