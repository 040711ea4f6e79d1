"""A picture of what routers did in training."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(names: Sequence[str], steps: Sequence[int], load: torch.Tensor, dropped: torch.Tensor, path: Path) -> None:
    """A panel for each layer: the load of each expert [steps, layers, experts], and the share that was dropped [steps,
    layers]."""
    picture = Figure(figsize=(3.2 * min(len(names), 4), 2.4 * -(-len(names) // 4)), dpi=96, layout="constrained")
    panels = picture.subplots(-(-len(names) // 4), min(len(names), 4), squeeze=False, sharey=True)
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    for layer, (name, axes) in enumerate(zip(names, panels.flat, strict=False)):
        panel(axes, steps, load[:, layer], dropped[:, layer].tolist())
        axes.set_title(f"layer {name}", loc="left", fontsize=9)
    part = path.with_name(path.name + ".part")
    picture.savefig(part, format="png")
    os.replace(part, path)


def panel(axes: Axes, steps: Sequence[int], load: torch.Tensor, dropped: list[float]) -> None:
    axes.plot(steps, load.numpy(), linewidth=1)
    axes.axhline(1 / load.shape[1], color="#6b7280", linewidth=0.8, linestyle="--")
    if any(dropped):
        axes.fill_between(steps, dropped, color="#b04a4a", alpha=0.2, label="dropped")
        axes.legend(frameon=False, fontsize=7)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("share of the choices", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
