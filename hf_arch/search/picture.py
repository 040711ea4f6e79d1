"""A picture of a search: how far down the right documents stand, and how near the queries lie to them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from hf_arch.publish import staged_file
from hf_arch.search.ranking import ranks

QUERY, DOCUMENT, LINE = "#d08a1d", "#0b6e99", "#9fb3c8"
SHOWN = 60  # queries in a map


def draw_ranks(
    found: Mapping[str, tuple[torch.Tensor, torch.Tensor]], path: str | Path, maps: tuple[str, ...] = ()
) -> None:
    """Write a PNG to `path`, whole or not at all: recall at every k for each way to search, and of those named in
    `maps` the vectors in two dimensions.

    found: by name, (queries [n, size], documents [n or more, size]), the document of a query in the same place. In a
    map each query is joined to its document: the first two principal components of both, each about its own mean, since
    short queries and long documents lie apart as a whole. Example:

        draw_ranks({"before": before, "after": after}, "search.png", maps=("before", "after"))
    """
    if unknown := set(maps) - set(found):
        raise ValueError(f"There is no {', '.join(sorted(unknown))} to make a map of; there are {', '.join(found)}.")
    picture = Figure(figsize=(4.4 * (1 + len(maps)), 4), dpi=130, layout="constrained")
    first, *others = picture.subplots(1, 1 + len(maps), squeeze=False)[0]
    for name, (queries, documents) in found.items():
        draw_recall(first, name, ranks(queries, documents), len(documents))
    first.set(xscale="log", ylim=(0, 1), xlabel="k", title="recall at k")
    first.legend(frameon=False, fontsize=8, loc="upper left")
    first.spines[["top", "right"]].set_visible(False)
    for axes, name in zip(others, maps, strict=True):
        draw_map(axes, *found[name])
        axes.set_title(name)
    with staged_file(path) as stage:
        picture.savefig(stage, format="png")


def draw_recall(axes: Axes, name: str, of_queries: torch.Tensor, most: int) -> None:
    places = torch.unique(torch.logspace(0, torch.tensor(float(most)).log10().item(), 100).long())
    axes.plot(places, [(of_queries <= place).float().mean().item() for place in places], label=name)


def draw_map(axes: Axes, queries: torch.Tensor, documents: torch.Tensor) -> None:
    count = min(SHOWN, len(queries))
    centred = torch.cat([each[:count].float() - each[:count].float().mean(0) for each in (queries, documents)])
    plane = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
    ends = plane.unflatten(0, (2, count)).transpose(0, 1)
    axes.add_collection(LineCollection(ends.numpy(), colors=LINE, linewidths=0.8))
    for place, color, label in ((0, QUERY, "queries"), (1, DOCUMENT, "their documents")):
        axes.scatter(*ends[:, place].T, s=14, color=color, label=label, zorder=2)
    axes.set(xticks=[], yticks=[])
    axes.legend(frameon=False, fontsize=8, loc="upper left")
