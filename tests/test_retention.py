"""What only retention promises, beside `test_recurrences.py`, and how an op is handed to a kernel."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from hf_arch.modeling.ops.dispatch import accelerated, on_packed_rows
from hf_arch.modeling.ops.retention import chunk_retention, recurrent_retention, retention_decay


def some_inputs(length, dtype=torch.float64, batch=2, heads=3):
    generator = torch.Generator().manual_seed(length)
    query, key = torch.randn(2, batch, length, heads, 8, generator=generator, dtype=dtype)
    return query, key, torch.randn(batch, length, heads, 16, generator=generator, dtype=dtype)


def some_documents(length, generator, batch=2):
    real = torch.rand(batch, length, generator=generator) > 0.2
    return ((torch.rand(batch, length, generator=generator) < 0.05).cumsum(1) + 1) * real


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


def test_what_a_kernel_declines_the_torch_function_does(monkeypatch):
    """With a stand-in for a tensor on a GPU."""
    calls = []

    def kernel(query, scale):
        return query.values * scale

    def adapt(kernel, query, *, documents=None, scale=1):
        calls.append("kernel")
        return NotImplemented if documents is not None else kernel(query, scale)

    def torch_function(query, *, documents=None, scale=1):
        calls.append("torch")
        return query.values * scale

    monkeypatch.setitem(sys.modules, "some_kernels", SimpleNamespace(kernel=kernel))
    op = accelerated("some_kernels:kernel", adapt=adapt, packs=False)(torch_function)
    query = SimpleNamespace(is_cuda=True, dtype=torch.float32, values=3)
    assert op(query, scale=2) == 6 and calls == ["kernel"]
    assert op(query, documents=[1], scale=2) == 6 and calls == ["kernel", "kernel", "torch"]
    monkeypatch.setenv("HF_ARCH_KERNELS", "0")
    assert op(query) == 3 and calls[3:] == ["torch"]
