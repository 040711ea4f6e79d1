"""The snippets of docs/tools.md, which the tests of each tool run."""

import re
import shlex
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "docs" / "tools.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))


def run(section: str, replaced: dict[str, str] | None = None) -> dict:
    """Run the section's Python in the folder where we are, some words of it `replaced`; answer its names."""
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL):
        for old, new in (replaced or {}).items():
            assert old in snippet, f"{section} says nothing of {old}"
            snippet = snippet.replace(old, new)
        exec(compile(snippet, "docs/tools.md", "exec"), names)
    return names


def command(section: str) -> list[str]:
    """The section's first command of a shell, as words."""
    return shlex.split(re.search(r"```bash\n(.*?)\n", SECTIONS[section])[1])
