"""Docstrings as Markdown: of the public names, and of what configs have in common."""

import inspect
import re
import textwrap

import hf_arch
from hf_arch.architecture import Architecture


def reference() -> str:
    """A page of all public names of hf_arch."""
    parts = ["# API", "What `import hf_arch` gives."]
    for name in sorted(hf_arch.__all__, key=str.lower):
        thing = getattr(hf_arch, name)
        parts.append(f"## {name}")
        if callable(thing):
            parts.append(f"```python\n{signature(name, thing)}\n```\n\n{prose(thing.__doc__)}")
        else:
            parts.append("The rows of the catalogue: [the architectures](architectures/index.md).")
    return "\n\n".join(parts)


def configuration() -> str:
    """A page of the fields that configs have in common."""
    own = {row.load("Config") for row in hf_arch.ARCHITECTURES}
    shared = {base: None for row in hf_arch.ARCHITECTURES for base in ancestors(row.load("Config")) if base not in own}
    parts = ["# Configuration", "The fields that architectures share; what is one's own stands on its page."]
    for base in sorted(shared, key=lambda base: len(base.__mro__)):
        parts += [f"## {base.__name__}", prose(base.__doc__), defaults(base, own_fields(base))]
    return "\n\n".join(parts)


def ancestors(config: type) -> list[type]:
    """The classes of hf_arch that a config has fields of, the nearest first."""
    return [base for base in config.__mro__[1:] if "hf_arch" in base.__module__ and own_fields(base)]


def inherited(row: Architecture) -> str:
    """Links to where the fields that a row has of others are told."""
    rows = {row.load("Config"): row.name for row in hf_arch.ARCHITECTURES}
    return ", ".join(
        f"[`{base.__name__}`]({rows[base]}.md#configuration)"
        if base in rows
        else f"[`{base.__name__}`](../configuration.md#{base.__name__.lower()})"
        for base in ancestors(row.load("Config"))
    )


def signature(name: str, thing) -> str:
    """As it is called, an argument a line where they do not fit into one."""
    told = inspect.signature(thing)
    short = f"hf_arch.{name}{told}"
    if len(short) <= 100:
        return short
    arguments = ",\n    ".join(str(parameter) for parameter in told.parameters.values())
    return f"hf_arch.{name}(\n    {arguments},\n)"


def prose(docstring: str) -> str:
    """What is said of arguments as lists, indented lines and examples as code."""
    blocks = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    return "\n\n".join(map(block, blocks))


def block(text: str) -> str:
    lines = text.splitlines()
    if all(line.startswith("    ") for line in lines):
        language = "python" if ">>>" in text else "text"
        return f"```{language}\n{textwrap.dedent(text)}\n```"
    told: list[list[str]] = []
    for line in lines:
        if line.startswith("    ") and told:
            told[-1].append(line.strip())
        else:
            told.append([line])
    if all(len(item) == 1 for item in told):
        return text
    return "\n".join(f"- {' '.join(item)}" for item in told)


def all_fields(config: type) -> list[str]:
    """Those that hf_arch's own classes name, from the common ones on."""
    return list(dict.fromkeys(name for base in (*reversed(ancestors(config)), config) for name in own_fields(base)))


def defaults(config: type, names: list[str]) -> str:
    lines = [f"| `{name}` | `{getattr(config, name, None)!r}` |" for name in names]
    return "\n".join(["| field | default |", "|---|---|", *lines])


def own_fields(base: type) -> list[str]:
    return [name for name, kind in vars(base).get("__annotations__", {}).items() if "ClassVar" not in str(kind)]
