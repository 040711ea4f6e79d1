"""What the demo found: samples of what the models write, a table, and a picture of the learning curves."""

import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from hf_arch.demo.job import Job, Stage
from hf_arch.demo.tokens import TokenizedCorpus
from hf_arch.demo.training import Point

TRAIN, HELD_OUT = "#9fb3c8", "#0b6e99"
BASELINES = {"bigram": "#d08a1d", "trigram": "#8f3985"}


def show(job: Job, samples: dict[str, str], address: str | None) -> None:
    console = job.screen.console
    for name, text in zip(("base", "adapter"), job.texts, strict=True):
        written = Text.assemble((text.prompt, "dim"), samples[name].removeprefix(text.prompt))
        console.print(
            Panel(written, title=f"what the {name} writes after a prompt of held-out text", title_align="left")
        )
    console.print(table(job))
    console.print(f"Everything is in [bold]{job.folder}[/]: base, adapter, merged, and the learning curves, curves.png")
    if address:
        console.print(f"Pushed to {address}")


def table(job: Job) -> Table:
    grid = Table(title="What held-out text costs", box=SIMPLE_HEAD, title_justify="left")
    grid.add_column("")
    for text in job.texts:
        name = text.name.split()[-1]
        grid.add_column(f"{name}\nnats /\ntoken", justify="right")
        grid.add_column(f"{name}\nbits /\nbyte", justify="right", style="bold")
    for title in ("\ntrained\nparameters", "\nweights\non disk", "\n\nseconds"):
        grid.add_column(title, justify="right")
    for stage in job.stages:
        grid.add_row(*cells(stage), end_section=stage.name == "trigram")
    return grid


def cells(stage: Stage) -> list[str]:
    figures = [cell for figure in stage.figures for cell in (f"{figure.loss:.3f}", f"{figure.bits_per_byte:.3f}")]
    parameters = f"{stage.parameters:,}" if stage.parameters else ""
    size = f"{stage.size / 1e6:.1f} MB" if stage.size else ""
    seconds = f"{stage.seconds:.0f}" if stage.seconds is not None else ""
    return [stage.name, *figures, parameters, size, seconds]


def picture(job: Job, base_curve: list[Point], adapter_curve: list[Point], path: Path) -> None:
    """Each training's loss in bits per byte, beside that of the n-gram models."""
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, job, 0, "untrained", base_curve)
    draw(right, job, 1, "base", adapter_curve)
    left.set_title(f"{job.row.title} learns {job.texts[0].name}", loc="left")
    right.set_title(f"LoRA on it learns {job.texts[1].name}", loc="left")
    left.set_ylabel("bits per byte")
    left.legend(frameon=False)
    part = path.with_suffix(".part")
    figure.savefig(part, format="png")
    os.replace(part, path)


def draw(axes: Axes, job: Job, which: int, start: str, curve: list[Point]) -> None:
    text: TokenizedCorpus = job.texts[which]
    height = {stage.name: stage.figures[which].bits_per_byte for stage in job.stages}
    steps = [point.step for point in curve]
    axes.plot(
        steps,
        [text.train.figures(point.train_loss).bits_per_byte for point in curve],
        color=TRAIN,
        label="training text",
    )
    held_out = [height[start], *(point.held_out.bits_per_byte for point in curve)]
    axes.plot([0, *steps], held_out, color=HELD_OUT, marker="o", markersize=4, label="held-out text")
    for name, color in BASELINES.items():
        axes.axhline(height[name], color=color, linestyle="--", linewidth=1)
        label = f"{name} {height[name]:.2f}"
        axes.annotate(
            label,
            (1, height[name]),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            color=color,
        )
    axes.annotate(
        f"{held_out[-1]:.2f}", (steps[-1], held_out[-1]), xytext=(4, -4), textcoords="offset points", color=HELD_OUT
    )
    axes.set_xlabel("step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e9ee")
