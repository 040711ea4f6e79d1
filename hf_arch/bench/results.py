"""What was measured of a row and its peers, where and with what; kept as JSON."""

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from hf_arch.bench.settings import Settings


@dataclass
class Figure:
    """One contender at one measure and length."""

    who: str
    measure: str
    length: int
    seconds: float | None = None  # of a call: a pass over the whole length, or one token after it; the median
    samples: list[float] = field(default_factory=list)
    ratio: float | None = None  # of a peer: its time over ours, the median of the rounds
    floor: float | None = None  # of ours: seconds, at the rates that were measured beside the samples
    times_floor: float | None = None  # the median of the rounds
    rates: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    state_bytes: int | None = None
    operations: int | None = None  # counted
    failure: str | None = None

    @property
    def tokens_per_second(self) -> float | None:
        if self.seconds is None:
            return None
        return (1 if self.measure in ("step", "generate") else self.length) / self.seconds


@dataclass
class Result:
    row: str
    machine: dict
    settings: dict
    parameters: dict[str, int]  # of each contender, ours first
    figures: list[Figure]

    @property
    def name(self) -> str:
        """Of its files: a GPU's figures stand beside a CPU's."""
        return self.row if self.settings["device"] == "cpu" else f"{self.row}-{self.settings['device'].split(':')[0]}"

    def of(self, who: str, measure: str) -> list[Figure]:
        found = (figure for figure in self.figures if (figure.who, figure.measure) == (who, measure))
        return sorted(found, key=lambda figure: figure.length)

    def exponents(self, who: str, measure: str) -> dict[str, float]:
        """By which power of the length time, memory and operations of a contender grow."""
        grown = {"time": "seconds", "memory": "peak_bytes", "operations": "operations", "state": "state_bytes"}
        fitted = {}
        for name, field_name in grown.items():
            points = [(figure.length, getattr(figure, field_name)) for figure in self.of(who, measure)]
            points = [(length, value) for length, value in points if value and value > 0]
            if len(points) > 1:
                fitted[name] = exponent(*zip(*points, strict=True))
        return fitted

    def save(self, folder: Path) -> Path:
        path = folder / f"{self.name}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(rounded(asdict(self)), indent=1) + "\n")
        part.replace(path)
        return path

    @classmethod
    def load(cls, path: Path) -> "Result":
        kept = json.loads(path.read_text())
        return cls(figures=[Figure(**figure) for figure in kept.pop("figures")], **kept)


def load(folder: Path) -> list[Result]:
    """The results kept in a folder, in the order of their names."""
    return [Result.load(path) for path in sorted(folder.glob("*.json"))]


def exponent(lengths: Sequence[float], values: Sequence[float]) -> float:
    """The power of the length that `values` grow by: the slope of a line through their logarithms."""
    x, y = ([math.log(value) for value in sequence] for sequence in (lengths, values))
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    across = sum((a - middle_x) ** 2 for a in x)
    return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / across


def rounded(value):
    """Four digits are more than a clock knows."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def this_machine(settings: Settings) -> dict:
    """What figures depend on beside the code."""
    gpu = torch.cuda.get_device_name(settings.device) if settings.device != "cpu" else None
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "load": [round(load, 1) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def processor() -> str:
    known = Path("/proc/cpuinfo")
    if known.exists():
        for line in known.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
