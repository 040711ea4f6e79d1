import gc
import os
import re
from collections import Counter

import pytest
import torch

from hf_arch import ARCHITECTURES
from promises import DECODERS, ENCODERS, HEADS, MODELS, ROWS, some_tokens

ROW_LIMIT = 80  # seconds of processor time that all tests of a row may take; half as much on a quiet machine
LONGEST = [f"test_{name}.py" for name in ("distributed", "gradients", "generate", "export", "trainer", "hub", "demo")]
spent: Counter[str] = Counter()


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that no process is left alone with one of them at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_runtest_teardown(item, nextitem):
    """What a file leaves behind is not looked at by every collection of garbage from there on: graphs of compiled
    models alone make each one take a second, and a Trainer asks for several."""
    if nextitem is not None and nextitem.path != item.path:
        torch._dynamo.reset()
        gc.collect()
        gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = sum(os.times()[:4])
    try:
        return (yield)
    finally:
        item.user_properties.append(("processor_seconds", sum(os.times()[:4]) - before))


def pytest_runtest_logreport(report):
    """Add up a row's time; the choices of a laboratory count apart, its heads together."""
    rows = "|".join(row.name for row in ARCHITECTURES)
    found = re.search(rf"\[(?:.*-)?({rows})-(\w+)", report.nodeid)
    if report.when == "call" and found:
        row, what = found.groups()
        name = row if what[:3] == "For" or what == "Model" else f"{row}-{what}"
        spent[name] += dict(report.user_properties).get("processor_seconds", 0)


def pytest_sessionfinish(session):
    if spent and max(spent.values()) > ROW_LIMIT:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("processor seconds per row")
    for name, seconds in spent.most_common(None if max(spent.values(), default=0) > ROW_LIMIT else 8):
        over = f"  over the limit of {ROW_LIMIT}: make its tests smaller" if seconds > ROW_LIMIT else ""
        terminalreporter.write_line(f"{seconds:6.1f}  {name}{over}")


@pytest.fixture
def tokens() -> torch.Tensor:
    return some_tokens()


@pytest.fixture(params=ROWS, ids=str)
def row_case(request):
    """Every row of the catalogue that writes text."""
    return request.param


@pytest.fixture(params=MODELS, ids=str)
def model_case(request):
    """Every row, with the head that names its tokens."""
    return request.param


@pytest.fixture(params=HEADS, ids=str)
def head_case(request):
    """Every head of every row."""
    return request.param


@pytest.fixture(params=DECODERS, ids=str)
def decoder_case(request):
    """Every row that writes text, and the laboratory's choices."""
    return request.param


@pytest.fixture
def decoder(decoder_case):
    return decoder_case.decoder()


@pytest.fixture(params=ENCODERS, ids=str)
def encoder_case(request):
    return request.param


@pytest.fixture
def encoder(encoder_case):
    return encoder_case.build()


@pytest.fixture
def narrows_nowhere(monkeypatch):
    """transformers narrows to float32 in places, in a float64 model too. Here it does not."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    to, wide = torch.Tensor.to, {torch.float32: torch.float64}
    monkeypatch.setattr(
        torch.Tensor, "to", lambda x, *told, **more: to(x, *(wide.get(one, one) for one in told), **more)
    )
