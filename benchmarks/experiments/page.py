"""`python -m benchmarks.experiments.page` writes EXPERIMENTS.md from what was recorded, beside what was published."""

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.experiments import (
    balance,
    context,
    duplication,
    evaluation_speed,
    hash_rounds,
    induction,
    levels,
    passkey,
    recall,
    selective_copying,
)
from benchmarks.experiments.experiment import Experiment
from benchmarks.experiments.record import RESULTS, load

EXPERIMENTS = tuple(
    module.EXPERIMENT for module in (induction, recall, duplication, hash_rounds, selective_copying, passkey, context)
)
PAGE = Path(__file__).parents[1] / "EXPERIMENTS.md"
INTRODUCTION = """# Experiments

Small tasks that a paper tells numbers of, run with the rows of the catalogue. Each is one command,

    python -m benchmarks.experiments.induction [--architecture NAME ...] [--size large --device cuda]

and adds to `benchmarks/results/experiments/`; `python -m benchmarks.experiments.page` writes this page from there.
The small size is for a CPU core, the large one for a GPU. Ours are single numbers, or the mean over seeds with the
lowest and the highest behind it; how they were made stands below each table. Published models were trained for longer,
with learning rates that were searched for: what should be compared is who solves a task, and at which lengths."""


def page(folder: Path = RESULTS) -> str:
    trained = [section(experiment, load(experiment.name, folder) or ()) for experiment in EXPERIMENTS]
    timed = [module.section(load(module.NAME, folder)) for module in (evaluation_speed, levels, balance)]
    return "\n\n".join([INTRODUCTION, *trained, *timed])


def section(experiment: Experiment, runs: Sequence[dict]) -> str:
    paper = f"[{experiment.paper}](https://arxiv.org/abs/{experiment.paper.removeprefix('arXiv:')})"
    parts = [f"## {experiment.title}", f"{experiment.task} {paper}"]
    for size in experiment.sizes:
        if mine := [run for run in runs if run["size"] == size]:
            parts += [f"### {size}: {experiment.unit}, by {experiment.columns}", ours(mine), settings(mine)]
    if not runs:
        parts.append(f"Not run yet: `python -m benchmarks.experiments.{experiment.name}`.")
    if experiment.published:
        parts += ["### published", published(experiment)]
    return "\n\n".join([*parts, *filter(None, [experiment.note])])


def ours(runs: Sequence[dict]) -> str:
    columns = list(dict.fromkeys(column for run in runs for column in run["scores"]))
    lines = []
    for name in dict.fromkeys(run["architecture"] for run in runs):
        mine = [run for run in runs if run["architecture"] == name]
        steps = spread([run["steps"] for run in mine], "{:.0f}")
        scores = [spread([run["scores"][column] for run in mine], digits(runs)) for column in columns]
        lines.append([f"`{name}`", f"{mine[0]['parameters'] / 1e3:.0f} K", steps, *scores])
    return table(["", "parameters", "steps", *columns], lines)


def digits(runs: Sequence[dict]) -> str:
    """Percents with one digit behind the point, bits with three."""
    return "{:.3f}" if max(max(run["scores"].values()) for run in runs) < 10 else "{:.1f}"


def spread(values: Sequence[float], form: str) -> str:
    mean = form.format(statistics.fmean(values))
    return mean if min(values) == max(values) else f"{mean} ({form.format(min(values))} - {form.format(max(values))})"


def settings(runs: Sequence[dict]) -> str:
    """How the runs were made; usually all in the same way."""
    ways, seeds = {}, Counter(run["architecture"] for run in runs)
    for run in runs:
        ways.setdefault((way(run), seeds[run["architecture"]]), []).append(run)
    parts = []
    for (text, count), same in ways.items():
        who = "" if len(ways) == 1 else ", ".join(dict.fromkeys(f"`{run['architecture']}`" for run in same)) + ": "
        took = [run["seconds"] for run in same]
        parts.append(
            f"{who}{text}; {count} seed{'s' * (count > 1)}, {min(took):.0f} to {max(took):.0f} s of training each."
        )
    return " ".join(parts)


def way(run: dict) -> str:
    shape, schedule, machine = run["shape"], run["schedule"], run["machine"]
    trained = ", ".join(f"{name} {value}" for name, value in run["train"].items())
    return (
        f"{shape['num_hidden_layers']} layers, width {shape['hidden_size']}, {shape['num_attention_heads']} heads, "
        f"feed-forward {shape['intermediate_size']}, trained on {trained}, at most {schedule['steps']:,} steps of "
        f"{schedule['batch']}, AdamW {schedule['learning_rate']}{' cosine' if schedule['cosine'] else ''}, ended below "
        f"{schedule['solved']} nats; {run['examples']} test examples; {machine['gpu'] or machine['processor']}, "
        f"torch {machine['torch']}, {machine['date']}"
    )


def published(experiment: Experiment) -> str:
    columns = list(dict.fromkeys(column for found in experiment.published.values() for column in found))
    lines = [
        [who, *(f"{found[column]:g}" if column in found else "" for column in columns)]
        for who, found in experiment.published.items()
    ]
    return table(["", *columns], lines)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


if __name__ == "__main__":
    PAGE.write_text(page() + "\n")
    print(f"Wrote {PAGE}")
