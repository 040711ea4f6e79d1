"""Docstrings as Markdown: of the public names, and of what configs have in common."""

import inspect
import re
import textwrap

import hf_arch
from hf_arch.modeling.hierarchical.hnet.configuration_hnet import HierarchyConfig
from hf_arch.modeling.long_context.longformer.configuration_longformer import DirectedConfig
from hf_arch.modeling.skeleton.config import ArchConfig, AttentionConfig
from hf_arch.modeling.skeleton.expert_config import ExpertConfig

SHARED = (ArchConfig, ExpertConfig, AttentionConfig, DirectedConfig, HierarchyConfig)


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
    parts = ["# Configuration", "The fields that architectures share; what is one's own stands on its page."]
    for config in SHARED:
        parts += [f"## {config.__name__}", prose(config.__doc__), defaults(config)]
    return "\n\n".join(parts)


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


def defaults(config: type) -> str:
    """A table of the fields that hf_arch's own classes name, from the common ones on."""
    names = [name for base in reversed(config.__mro__) if "hf_arch" in base.__module__ for name in own_fields(base)]
    lines = [f"| `{name}` | `{getattr(config, name, None)!r}` |" for name in dict.fromkeys(names)]
    return "\n".join(["| field | default |", "|---|---|", *lines])


def own_fields(base: type) -> list[str]:
    return [name for name, kind in vars(base).get("__annotations__", {}).items() if "ClassVar" not in str(kind)]
