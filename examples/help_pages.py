"""Real questions with real answers: what `help()` says of Python's functions is a document, and its signature and
docstring answer what they return, raise, take first, and fall back on."""

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from io import StringIO

LONGEST = 120  # characters of an answer
RETURNS = re.compile(r"(?:^|\n\s*|\. +)Returns? (?:an? |the )?(.+?)(?=[.:;,]\s|[.:;]?$|\n\n| if | or )", re.DOTALL)
RAISES = re.compile(r"\b[A-Z]\w+(?:Error|Exception)\b")


def members(module: str) -> list[tuple[str, object]]:
    with suppress(Exception), redirect_stdout(StringIO()):  # some modules are of other systems, some greet
        return inspect.getmembers(importlib.import_module(module), callable)
    return []


def functions() -> Iterator[tuple[str, str, inspect.Signature, str]]:
    """Of each function and class that a module of Python documents: module, name, signature and docstring."""
    for module in sorted(sys.stdlib_module_names - {"antigravity", "this", "idlelib", "turtledemo"}):
        for name, what in members(module) if module[0] != "_" else ():
            if name[0] != "_" and getattr(what, "__module__", None) == module and inspect.getdoc(what):
                with suppress(ValueError):  # no signature
                    yield module, name, inspect.signature(what), inspect.getdoc(what)


def questions(module: str, name: str, signature: inspect.Signature, says: str) -> Iterator[dict]:
    """What can be asked of one page, as in SQuAD: {"question", "context", "answers"}."""
    head = f"{name}{signature}"
    page = f"Help on {module}.{name}:\n\n{head}\n\n{says}"
    begin, body = page.index(head) + len(name), page.index(head) + len(head)

    def asked(question: str, start: int, answer: str) -> dict:
        return {"question": question, "context": page, "answers": {"text": [answer], "answer_start": [start]}}

    if (returned := RETURNS.search(page, body)) and len(returned[1]) <= LONGEST:
        yield asked(f"What does {module}.{name} return?", returned.start(1), returned[1])
    if raised := RAISES.search(page, body):
        yield asked(f"What does {module}.{name} raise?", raised.start(), raised[0])
    known = [*signature.parameters.values()]
    for parameter, question in [
        *((parameter, f"What does {module}.{name} take first?") for parameter in known[:1]),
        *((p, f"What is the default of {p.name}?") for p in known if p.default is not p.empty),
    ][:2]:
        found = re.compile(rf"[(, *]({parameter.name})(?:: [^=]+)?( ?= ?)?").search(page, begin, body)
        value = parameter.name if question.endswith("first?") else repr(parameter.default)
        start = found and (found.start(1) if question.endswith("first?") else found.end())
        if found and len(value) <= LONGEST and page.startswith(value, start):
            yield asked(question, start, value)


def help_pages() -> dict[str, list[dict]]:
    """The questions about each module."""
    found: dict[str, list[dict]] = {}
    for module, *page in functions():
        found.setdefault(module, []).extend(questions(module, *page))
    return {module: asked for module, asked in found.items() if asked}
