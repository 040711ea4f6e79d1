"""What was measured, as JSON, as a Markdown page and as a picture."""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from hf_arch.evaluate.bits import AtContext, AtPositions, Estimate
from hf_arch.evaluate.passkey import Cell

POSITION, CONTEXT, TRAINED = "#9fb3c8", "#0b6e99", "#d08a1d"
SHADES = LinearSegmentedColormap.from_list("found", ["#f4e9d8", CONTEXT])


@dataclass(frozen=True)
class Report:
    model: str
    model_type: str
    parameters: int
    trained_length: int | None  # max_position_embeddings
    text: dict  # files, bytes, tokens
    settings: dict
    read_in_pieces: bool  # through the cache; else each text in one pass
    by_position: list[AtPositions]
    by_context: list[AtContext]
    passkey: list[Cell]
    machine: dict
    seconds: float

    def save(self, folder: Path) -> None:
        picture, page, data = (folder / f"evaluation.{end}" for end in ("png", "md", "json"))
        draw(self, picture)
        replace(page, markdown(self))
        replace(data, json.dumps(finite(asdict(self)), indent=1) + "\n")


def replace(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def finite(value):
    """JSON knows no nan: what overflowed is null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(report: Report) -> str:
    text, settings = report.text, report.settings
    trained = f", made for lengths up to {report.trained_length:,}" if report.trained_length else ""
    way = f"in pieces of {settings['piece']} tokens through its cache" if report.read_in_pieces else "in one pass"
    parts = [
        f"# {report.model}",
        f"`{report.model_type}`, {report.parameters / 1e6:.2f} M parameters{trained}. Text: "
        f"{', '.join(text['files'])}, {text['bytes']:,} bytes, {text['tokens']:,} tokens. Each text was read {way}; "
        f"{settings['dtype']}, {settings['device']}, {report.seconds:.0f} s.",
        "## Bits per byte by context length",
        f"The same {settings['measured_tokens']} tokens at the end of {settings['windows']} windows, with more "
        "and more text before them. Behind ±, the standard error over the windows: lengths share their windows, so "
        "that they differ by less than it says.",
        table(["length", "bits per byte"], [[f"{at.length:,}", estimate(at)] for at in report.by_context]),
        "## Bits per byte by position",
        table(
            ["positions", "bits per byte"],
            [[f"{at.first:,} - {at.last:,}", estimate(at)] for at in report.by_position],
        ),
        "## Pass key",
        "Share of the trials in which a number hidden in the text is found again; in brackets, of its tokens.",
        passkey_table(report) if report.passkey else "No pass key fits into these lengths.",
        "![evaluation](evaluation.png)",
    ]
    return "\n\n".join(parts) + "\n"


def table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["--:"] * len(header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def estimate(at: Estimate) -> str:
    if not math.isfinite(at.bits_per_byte):
        return "overflow"
    return f"{at.bits_per_byte:.3f}" + (f" ± {at.error:.3f}" if at.error is not None else "")


def passkey_table(report: Report) -> str:
    lengths, depths, cells = grid(report)
    lines = [[f"{length:,}", *(in_words(cells[length, depth]) for depth in depths)] for length in lengths]
    return table(["length \\ depth", *(f"{depth:.0%}" for depth in depths)], lines)


def in_words(cell: Cell) -> str:
    return f"{cell.retrieved:.0%} ({cell.tokens_right:.0%})"


def grid(report: Report) -> tuple[list[int], list[float], dict[tuple[int, float], Cell]]:
    cells = {(cell.length, cell.depth): cell for cell in report.passkey}
    return sorted({length for length, _ in cells}), sorted({depth for _, depth in cells}), cells


def draw(report: Report, path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_bits(left, report)
    draw_passkey(right, report)
    figure.suptitle(report.model, x=0.01, ha="left")
    part = path.with_suffix(".part")
    figure.savefig(part, format="png")
    os.replace(part, path)


def draw_bits(axes: Axes, report: Report) -> None:
    middles = [math.sqrt(at.first * at.last) for at in report.by_position]
    axes.plot(
        middles,
        [at.bits_per_byte for at in report.by_position],
        color=POSITION,
        marker="o",
        markersize=3,
        label="by position",
    )
    lengths, bits = [at.length for at in report.by_context], [at.bits_per_byte for at in report.by_context]
    axes.errorbar(
        lengths, bits, [at.error or 0 for at in report.by_context], color=CONTEXT, marker="o", label="by context"
    )
    if report.trained_length and report.trained_length <= 2 * max(lengths):
        axes.axvline(report.trained_length, color=TRAINED, linestyle="--", linewidth=1, label="max_position_embeddings")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.set_title("bits per byte", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e9ee")


def draw_passkey(axes: Axes, report: Report) -> None:
    axes.set_title("pass key found", loc="left", fontsize=10)
    if not report.passkey:
        axes.text(0.5, 0.5, "no pass key fits into these lengths", ha="center", va="center")
        axes.set_axis_off()
        return
    lengths, depths, cells = grid(report)
    found = [[cells[length, depth].retrieved for length in lengths] for depth in depths]
    axes.imshow(found, cmap=SHADES, vmin=0, vmax=1, aspect="auto")
    for row, depth in enumerate(depths):
        for column, length in enumerate(lengths):
            share = cells[length, depth].retrieved
            axes.text(
                column, row, f"{share:.0%}", ha="center", va="center", color="white" if share > 0.5 else "#333333"
            )
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth")
