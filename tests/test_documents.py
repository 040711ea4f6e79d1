"""Unpacking documents into rows of their own, and back."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from hf_arch.modeling.ops.documents import find_documents

ROW = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=4)  # (padding before, tokens) of each document


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=4))
def test_unpack_gives_each_document_alone_and_repack_undoes_it(batch):
    numbers = [[n for i, (pad, size) in enumerate(row, 1) for n in [0] * pad + [i] * size] for row in batch]
    length = max(map(len, numbers)) + 1
    documents = torch.tensor([row + [0] * (length - len(row)) for row in numbers])
    packed = torch.arange(documents.numel() * 2.0).view(*documents.shape, 2) + 1
    expected = [packed[i, documents[i] == n] for i in range(len(batch)) for n in range(1, len(batch[i]) + 1)]
    found = find_documents(documents)
    rows = found.unpack(packed)
    assert len(rows) == len(expected) and found.lengths.tolist() == [len(text) for text in expected]
    for row, text in zip(rows, expected, strict=True):
        assert_close(row[: len(text)], text)
        assert not row[len(text) :].any()
    assert_close(found.repack(rows, *documents.shape), packed * (documents > 0)[..., None])
    assert found.first.sum() == found.last.sum() == sum(bool(row) for row in batch)


def test_a_fourier_convolution_over_unpacked_rows_meets_no_other_document():
    """What the tool is for: a long convolution cannot be told to forget, so each document is convolved alone."""
    filter_ = torch.randn(64, dtype=torch.float64)

    def convolve(rows):
        size = 2 * rows.shape[1]
        return torch.fft.irfft(torch.fft.rfft(rows, size) * torch.fft.rfft(filter_[: rows.shape[1]], size), size)[
            :, : rows.shape[1]
        ]

    tokens = torch.randn(2, 40, dtype=torch.float64)
    documents = torch.tensor([[0] * 5 + [1] * 20 + [2] * 15, [1] * 33 + [0] * 7])
    found = find_documents(documents)
    output = found.repack(convolve(found.unpack(tokens)), 2, 40)
    assert_close(output[0, 5:25], convolve(tokens[:1, 5:25])[0])
    assert_close(output[0, 25:], convolve(tokens[:1, 25:])[0])
    assert_close(output[1, :33], convolve(tokens[1:, :33])[0])
