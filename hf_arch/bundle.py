"""The code of an architecture as the files of a Hub repository that load without this package (trust_remote_code).

Our sources keep rules that make this a concatenation: imports of our own are relative, name what they take and give
it no other name; no top-level name is defined twice in `modeling/`.
"""

import ast
import functools
import importlib.util
import symtable
from collections.abc import Iterable
from pathlib import Path

from hf_arch.architecture import Architecture

HEADER = """# SPDX-License-Identifier: Apache-2.0
# Joined by hf_arch from its sources. They are the place for changes; this file is written anew at every export.
"""


class Source:
    """One of our modules, taken apart."""

    def __init__(self, module: str):
        self.module = module
        self.text = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
        tree = ast.parse(self.text)
        self.statements, self.docstring = tree.body, ast.get_docstring(tree)
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        self.ours = [node for node in imports if isinstance(node, ast.ImportFrom) and node.level]
        self.theirs = [node for node in imports if node not in self.ours]

    def needs(self) -> list[str]:
        """The modules of ours that it imports, in the order of `ours`."""
        package = self.module.rpartition(".")[0]
        return [importlib.util.resolve_name("." * node.level + node.module, package) for node in self.ours]

    def body(self) -> str:
        """All but the docstring and the imports, as written, comments included."""
        lines = self.text.split("\n")
        for node in (*self.statements[: self.docstring is not None], *self.ours, *self.theirs):
            lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
        return "\n".join(line for line in lines if line is not None).strip()

    def opening(self) -> str:
        """The docstring as written."""
        lines = self.text.split("\n")
        return "\n".join(lines[: self.statements[0].end_lineno]) if self.docstring else ""

    def part(self) -> str:
        """The body, under the docstring as a comment."""
        title = "\n".join(f"# {line}".rstrip() for line in (self.docstring or "").splitlines())
        return f"{title}\n\n\n{self.body()}".strip()

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """The top-level names, each with what it stands for."""
        symbols = symtable.symtable(self.text, self.module, "exec").get_symbols()
        found = {symbol.get_name(): f"{self.module}.{symbol.get_name()}" for symbol in symbols if symbol.is_assigned()}
        for node in self.theirs:
            for alias in node.names:
                if isinstance(node, ast.ImportFrom):
                    found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                else:  # `import a.b` gives the name a, `import a.b as c` what b is
                    top = alias.name.partition(".")[0]
                    found[alias.asname or top] = alias.name if alias.asname else top
        return found


source_of = functools.cache(Source)


def bundle(row: Architecture) -> dict[str, str]:
    """The names of the files, and their texts: the configuration, the models, which import from it alone, and the
    processor where there is one.

    Raises ValueError where two of the modules that are joined mean different things by one name.
    """
    configuration, modeling = f"configuration_{row.name}", f"modeling_{row.name}"
    where = f"hf_arch.modeling.{row.family}.{row.name}"
    of_config, joined = in_order(f"{where}.{configuration}"), in_order(f"{where}.{modeling}")
    of_model = [source for module, source in joined.items() if module not in of_config]
    refuse_collisions(joined.values())
    taken = [
        ast.ImportFrom(configuration, node.names, level=1)
        for source in of_model
        for module, node in zip(source.needs(), source.ours, strict=True)
        if module in of_config
    ]
    files = {f"{configuration}.py": join(of_config.values()), f"{modeling}.py": join(of_model, taken)}
    if row.processor:
        files[f"processing_{row.name}.py"] = join(in_order(f"{where}.processing_{row.name}").values())
    return files


def in_order(module: str, found: dict[str, Source] | None = None) -> dict[str, Source]:
    """`module` and all that it imports of ours, each after what it needs."""
    found = {} if found is None else found
    if module not in found:
        source = source_of(module)
        for needed in source.needs():
            in_order(needed, found)
        found[module] = source
    return found


def refuse_collisions(sources: Iterable[Source]) -> None:
    meanings = {}
    for source in sources:
        for name, meaning in source.names.items():
            other = meanings.setdefault(name, meaning)
            if other != meaning:
                raise ValueError(f"One file cannot hold both {other} and {meaning}: rename one of them.")


def join(sources: Iterable[Source], taken: Iterable[ast.ImportFrom] = ()) -> str:
    """One file of `sources`, the last of which gives its docstring; `taken` is imported beside what they import."""
    *parts, last = sources
    theirs = [node for source in (*parts, last) for node in source.theirs]
    head = f"{HEADER}{last.opening()}\n\n{import_lines(theirs)}\n\n{import_lines(taken)}".strip()
    bodies = [part for part in (*(source.part() for source in parts), last.body()) if part]
    return "\n\n\n".join((head, *bodies)) + "\n"


def import_lines(nodes: Iterable[ast.Import | ast.ImportFrom]) -> str:
    """The imports, each module and each name once."""
    whole, taken = set(), {}
    for node in nodes:
        if isinstance(node, ast.Import):
            whole |= {ast.unparse(ast.Import([alias])) for alias in node.names}
        else:
            taken.setdefault("." * node.level + node.module, set()).update(ast.unparse(alias) for alias in node.names)
    lines = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(taken.items())]
    return "\n".join((*sorted(whole), *(line if len(line) <= 120 else wrapped(line) for line in lines)))


def wrapped(line: str) -> str:
    module, _, names = line.partition(" import ")
    return f"{module} import (\n    " + names.replace(", ", ",\n    ") + ",\n)"
