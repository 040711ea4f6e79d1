"""Long convolutions: causal to the last bit, both ways, and quick. Their two forms are in test_recurrences.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_arch.modeling.ops.long_convolution import (
    GROUP,
    SMALLEST,
    fast_length,
    long_convolution,
    transform_kernel,
)


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [49.0, 1e6])
def test_the_future_is_not_felt_at_all(dtype, scale):
    """Where a Fourier transform over the text would feel it by rounding."""
    x, kernel = random(1, 1500, 3, dtype=dtype), random(3, 1500, dtype=dtype, seed=1)
    loud = x.clone()
    loud[:, 700:] *= scale
    assert torch.equal(long_convolution(loud, kernel)[0][:, :700], long_convolution(x, kernel)[0][:, :700])


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 1400), taps=st.integers(1, 1400), longer=st.integers(0, 3000))
def test_a_transform_serves_all_lengths_up_to_its_own(length, taps, longer):
    x, kernel = random(2, length, 2), random(2, taps, seed=1)
    padded = torch.nn.functional.pad(kernel, (0, max(0, length - taps)))
    expected = torch.nn.functional.conv1d(
        torch.nn.functional.pad(x.transpose(1, 2), (length - 1, 0)), padded[:, :length].flip(-1)[:, None], groups=2
    ).transpose(1, 2)
    transform = transform_kernel(kernel, length + longer)
    assert transform.tokens >= length + longer
    for options in ({}, {"transform": transform}):
        assert_close(long_convolution(x, kernel, **options)[0], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("length", [SMALLEST * GROUP, SMALLEST * GROUP + 1, 5000])
def test_gradients_of_long_texts(length):
    x, kernel = random(2, length, 2).requires_grad_(), random(2, length, seed=1).requires_grad_()
    weight, size = random(2, length, 2, seed=2), 2 * length
    spectrum = torch.fft.rfft(x, n=size, dim=1) * torch.fft.rfft(kernel.T, n=size, dim=0)
    plain = torch.fft.irfft(spectrum, n=size, dim=1)[:, :length]
    expected = torch.autograd.grad((plain * weight).sum(), (x, kernel))
    for options in ({}, {"transform": transform_kernel(kernel.detach(), length)}):
        output = long_convolution(x, kernel, **options)[0]
        assert_close(output, plain, atol=1e-9, rtol=1e-9)
        assert_close(torch.autograd.grad((output * weight).sum(), (x, kernel)), expected, atol=1e-9, rtol=1e-9)


def test_sizes_that_fourier_transforms_are_quick_at():
    assert [fast_length(least) for least in (1, 7, 8, 11, 121, 8191)] == [2, 8, 8, 12, 128, 8192]


def test_half_precision_is_computed_in_float32():
    x, kernel = random(1, 300, 3, dtype=torch.float32), random(3, 300, dtype=torch.float32, seed=1)
    output, state = long_convolution(x.bfloat16(), kernel, output_final_state=True)
    assert output.dtype == state.dtype == torch.bfloat16
    assert_close(output, long_convolution(x.bfloat16().float(), kernel)[0].bfloat16(), atol=0, rtol=0)


def test_padding_alone_is_no_text():
    x, kernel = random(2, 5, 3).requires_grad_(), random(3, 9, seed=1).requires_grad_()
    output, state = long_convolution(x, kernel, documents=torch.zeros(2, 5).long(), output_final_state=True)
    assert not output.any() and not state.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(output.sum(), (x, kernel)))
