"""Chooses the tests, times them, and hands the outcomes to `results.py`."""

import os

import pytest
from transformers import set_seed

from hf_arch.catalogue import find

from .declared import is_slow, reason_to_skip
from .results import Run, record

ROW_LIMIT = 40  # seconds of processor time that the tests of a row may take, the slow ones apart
run = Run()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also the slow tests")
    parser.addoption("--row", action="append", help="only this row of the catalogue (may be repeated)")
    parser.addoption("--record", action="store_true", help="write results.json and RESULTS.md")


def pytest_configure(config):
    try:
        config.rows = [find(name).name for name in config.getoption("row") or ()]
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_collection_modifyitems(config, items):
    asked = [item for item in items if not config.rows or item.cls.row.name in config.rows]
    kept = [item for item in asked if config.getoption("full") or not is_slow(item.name)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for item in items:
        item.user_properties.append(("row", item.cls.row.name))
        if reason := reason_to_skip(item.cls.row.name, item.name):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup(item):
    """transformers draws prompts and weights without a seed: what passes here passes again."""
    from .upstream import test_modeling_common

    set_seed(0)
    test_modeling_common.global_rng.seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = sum(os.times()[:4])
    try:
        return (yield)
    finally:
        item.user_properties.append(("processor_seconds", sum(os.times()[:4]) - before))


def pytest_runtest_logreport(report):
    run.note(report)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):
        return
    full = session.config.getoption("full")
    if session.config.getoption("record") and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        record(run, full)
    if not full and run.seconds and max(run.seconds.values()) > ROW_LIMIT:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("processor seconds per row")
    for row, seconds in run.seconds.most_common():
        over = seconds > ROW_LIMIT and not terminalreporter.config.getoption("full")
        terminalreporter.write_line(f"{seconds:6.1f}  {row}" + f"  over the limit of {ROW_LIMIT}" * over)
