"""What is said of all rows at once."""

import re
from pathlib import Path

from docs.render.row_page import RESULTS, in_symbols, paper, parts
from hf_arch.architecture import Architecture
from hf_arch.bench.report import table, typical
from hf_arch.bench.results import Result
from hf_arch.catalogue import ARCHITECTURES
from hf_arch.listing import heads_in_words

ROOT = Path(__file__).parents[2]
HEADER = ["architecture", "family", "paper", "heads", "training", "step", "state", "cannot keep"]
HEADER += ["forward, x its floor", "nearest peer, x our time"]


def of_all_rows() -> str:
    return "\n".join(table(HEADER, [line(row) for row in ARCHITECTURES]))


def line(row: Architecture) -> list[str]:
    cost = parts((ROOT / f"docs/architectures/{row.name}.md").read_text())[0]["cost"]
    told = [f"[{row.title}]({row.name}.md)", row.family.replace("_", " "), paper(row), heads_in_words(row)]
    told += [in_symbols(cost[name]) for name in ("training", "step", "state")]
    return [*told, ", ".join(row.exceptions) or "-", *ratios(row)]


def ratios(row: Architecture) -> list[str]:
    """Of a forward pass: our time over its floor, and the quickest peer's over ours."""
    if not (kept := RESULTS / f"{row.name}.json").exists():
        return ["", ""]
    result = Result.load(kept)
    ours = typical(result.of(row.name, "forward")).times_floor
    peers = {who: typical(result.of(who, "forward")).ratio for who in result.parameters if who != row.name}
    known = [(ratio, who) for who, ratio in peers.items() if ratio]
    return [f"{ours:.2f}" if ours else "", "{:.2f} (`{}`)".format(*min(known)) if known else ""]


def promises() -> str:
    """The section of CONTRIBUTING.md, as a page."""
    written = (ROOT / "CONTRIBUTING.md").read_text()
    return "# The promises" + re.search(r"## The promises(.*?)(?=^## )", written, re.DOTALL | re.MULTILINE)[1]
