"""Collected by pytest; `make conformance` calls it with transformers' tests in place."""

from .suites import open_closed_lists, suites

open_closed_lists()
globals().update(suites())
