"""A picture for each row: time, memory and state over the length, a step over the context; ours beside the peers."""

import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import LogLocator, NullLocator

from hf_arch.bench.results import Result
from hf_arch.catalogue import find

OURS, PEERS = "#0b6e99", ("#d08a1d", "#8f3985", "#4f8a5b", "#b04a4a", "#6b7280")
DECADE = 10
PANELS = (
    ("forward", "seconds", 1e3, "forward, ms"),
    ("training", "seconds", 1e3, "training, ms"),
    ("step", "seconds", 1e3, "step after a context, ms"),
    ("forward", "peak_bytes", 1e-6, "peak memory of forward, MB"),
    ("training", "peak_bytes", 1e-6, "peak memory of training, MB"),
    ("step", "state_bytes", 1e-6, "state after a context, MB"),
)


def draw(result: Result, path: Path) -> None:
    picture = Picture(figsize=(13, 7), dpi=72, layout="constrained")
    for axes, (kind, name, unit, title) in zip(picture.subplots(2, 3).flat, PANELS, strict=True):
        panel(axes, result, kind, name, unit)
        axes.set_title(title, loc="left", fontsize=10)
    picture.suptitle(find(result.row).title, x=0.01, ha="left")
    part = path.with_suffix(".part")
    picture.savefig(part, format="png")
    os.replace(part, path)


def panel(axes: Axes, result: Result, kind: str, name: str, unit: float) -> None:
    colors = dict(zip(result.parameters, (OURS, *PEERS * len(result.parameters)), strict=False))
    for who, color in colors.items():
        points = [(f.length, getattr(f, name) * unit) for f in result.of(who, kind) if getattr(f, name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, label=who)
    floors = [(f.length, f.floor * unit) for f in result.of(result.row, kind) if f.floor and name == "seconds"]
    if floors:
        axes.plot(*zip(*floors, strict=True), color=OURS, linestyle="--", linewidth=1, label=f"floor of {result.row}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if axes.lines:  # a flat line should look flat
        axes.set_ylim(min(low, high / DECADE), high * 1.2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    lengths = sorted({figure.length for figure in result.figures if figure.measure == kind})
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xlabel("tokens")
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e9ee")
