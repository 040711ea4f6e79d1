"""The page of an architecture: what a person wrote of it in architectures/<name>.md, and what is known of it beside."""

import importlib.util
import re
from pathlib import Path

from mkdocs.utils.meta import get_data

from benchmarks.experiments.page import EXPERIMENTS
from benchmarks.experiments.record import load
from docs.render.reference import all_fields, defaults, inherited, prose
from hf_arch.architecture import Architecture
from hf_arch.bench.report import growth, summary
from hf_arch.bench.results import Result
from hf_arch.listing import heads_in_words

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
FRONT = ("cost", "picture")
SECTIONS = ("Formula", "Cost", "Choose it", "Choose another", "Example")
SYMBOLS = (
    "$T$ tokens, $H$ width of the model, $D$ that of a head. A step is one more token after $T$ others; its state is "
    "what the cache holds of them, in numbers for each layer."
)
SEEN = (
    "How much answer $i$ changes when the embedding of token $j$ does, by a little: dark is much, over four powers of "
    "ten, and white is not at all. Measured at this build, in a tiny model of this row with random weights: white is "
    "out of reach, whatever is learned (in rows that choose by content, it is so in this text)."
)


def page(row: Architecture, written: str) -> str:
    front, introduction, sections = parts(written)
    seen = f"## What hears of what\n\n![which tokens change which answers]({row.name}.png)\n\n{SEEN}"
    return "\n\n".join(
        [
            f"# {row.title}",
            introduction,
            facts(row),
            sections["Formula"],
            seen,
            sections["Cost"],
            f"{costs(front['cost'])}\n\n{SYMBOLS}",
            promises(row),
            measured(row),
            sections["Choose it"],
            sections["Choose another"],
            sections["Example"],
            fields(row),
        ]
    )


def parts(written: str) -> tuple[dict, str, dict[str, str]]:
    """The front matter, what stands before the first heading, and each section with its heading, by its name."""
    markdown, front = get_data(written)
    introduction, *found = re.split(r"^(?=## )", markdown, flags=re.MULTILINE)
    sections = {text.splitlines()[0].removeprefix("## ").strip(): text.strip() for text in found}
    if missing := [name for name in FRONT if name not in front] + [name for name in SECTIONS if name not in sections]:
        raise ValueError(f"The page of an architecture needs {', '.join(missing)}: see CONTRIBUTING.md.")
    return front, introduction.strip(), sections


def example(written: str) -> str:
    """The code of the page's example."""
    return re.search(r"```python\n(.*?)```", parts(written)[2]["Example"], re.DOTALL)[1]


def paper(row: Architecture) -> str:
    return f"[{row.paper}](https://arxiv.org/abs/{row.paper.removeprefix('arXiv:')})"


def facts(row: Architecture) -> str:
    lines = {
        "paper": paper(row),
        "family": row.family.replace("_", " "),
        "`model_type`": f"`{row.model_type}`",
        "heads": f"{heads_in_words(row)}: `{row.prefix}Model`, ...",
        "`hf_arch.convert`": originals(row),
        "LoRA by default": ", ".join(f"`{name}`" for name in row.lora_targets),
    }
    first, *others = (f"| {name} | {told} |" for name, told in lines.items())
    return "\n".join([first, "|---|---|", *others])


def originals(row: Architecture) -> str:
    """What `hf_arch.convert` takes, as the first sentences of its module say it."""
    path = f"hf_arch.modeling.{row.family}.{row.name}.conversion_{row.name}"
    if importlib.util.find_spec(path) is None:
        return "no originals"
    return " ".join(importlib.import_module(path).__doc__.split("\n\n")[0].split())


def costs(cost: dict[str, str]) -> str:
    header = " | ".join(cost)
    cells = " | ".join(in_symbols(symbols) for symbols in cost.values())
    return f"| {header} |\n|{'---|' * len(cost)}\n| {cells} |"


def in_symbols(symbols: str | None) -> str:
    return f"${symbols}$" if symbols else "-"


def promises(row: Architecture) -> str:
    if not row.exceptions:
        return "## Promises\n\nKeeps all of the [promises](../promises.md) that are tested over the catalogue."
    broken = "\n".join(f"- **{promise}**: {reason}" for promise, reason in row.exceptions.items())
    return (
        "## Promises\n\nKeeps the [promises](../promises.md) that are tested over the catalogue, but for those that "
        f"its mathematics cannot keep, which is tested too:\n\n{broken}"
    )


def measured(row: Architecture) -> str:
    parts = ["## Measured"]
    if (kept := RESULTS / f"{row.name}.json").exists():
        result = Result.load(kept)
        picture = f"![time, memory and state over the length](../measured/{row.name}.png)"
        parts += [picture, summary([result]), growth(result), "All figures: [what was measured](../measured/index.md)."]
    if found := [experiment.title for experiment in EXPERIMENTS if took_part(row, experiment.name)]:
        parts.append(f"Trained on small tasks in the [experiments](../experiments.md): {', '.join(found)}.")
    return "\n\n".join(parts)


def took_part(row: Architecture, experiment: str) -> bool:
    return any(run["architecture"].split("-")[0] == row.name for run in load(experiment) or ())


def fields(row: Architecture) -> str:
    config = row.load("Config")
    table = indented(defaults(config, all_fields(config)))
    return (
        f"## Configuration\n\n`{config.__name__}`, beside the fields of {inherited(row)}:\n\n"
        f'{prose(config.__doc__)}\n\n??? note "All fields and their defaults"\n\n{table}'
    )


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
