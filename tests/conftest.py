import pytest
import torch

from promises import DECODERS, ENCODERS, HEADS, LENGTH, ROWS, some_tokens


def pytest_configure():
    torch.set_num_threads(1)  # the suite runs one process per core


@pytest.fixture
def tokens() -> torch.Tensor:
    return some_tokens()


@pytest.fixture
def length() -> int:
    return LENGTH


@pytest.fixture(params=ROWS, ids=str)
def row_case(request):
    """Every causal row of the catalogue."""
    return request.param


@pytest.fixture(params=HEADS, ids=str)
def head_case(request):
    """Every head of every row."""
    return request.param


@pytest.fixture(params=DECODERS, ids=str)
def decoder_case(request):
    """Every causal row, and the laboratory's choices."""
    return request.param


@pytest.fixture
def decoder(decoder_case):
    return decoder_case.build()


@pytest.fixture(params=ENCODERS, ids=str)
def encoder_case(request):
    return request.param


@pytest.fixture
def encoder(encoder_case):
    return encoder_case.build()
