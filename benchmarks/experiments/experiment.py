"""What an experiment is, and the command that runs one and keeps what was found as JSON."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.experiments.contenders import Contender, chosen
from benchmarks.experiments.record import RESULTS, load, write
from benchmarks.experiments.training import Make, Schedule, accuracy, train
from hf_arch.bench.results import rounded, this_machine
from hf_arch.bench.settings import Settings as MachineSettings


@dataclass(frozen=True)
class Size:
    """`train` and each of `tests` are arguments of the experiment's `make`."""

    shape: dict  # fields of the config
    schedule: Schedule
    train: dict
    tests: dict[str, dict]  # by the column that they fill
    examples: int = 256
    seeds: int = 1


def measure_accuracy(model: nn.Module, experiment: "Experiment", size: Size) -> dict[str, float]:
    """In percent, for each column."""
    return {
        column: 100 * accuracy(model, experiment.make, arguments, size.examples)
        for column, arguments in size.tests.items()
    }


@dataclass(frozen=True)
class Experiment:
    name: str
    title: str
    paper: str
    task: str  # in a sentence or two
    make: Make
    sizes: dict[str, Size]
    columns: str = "length"  # what the columns are
    published: dict[str, dict[str, float]] = field(default_factory=dict)  # who, with settings -> column -> value
    measure: Callable[[nn.Module, "Experiment", Size], dict[str, float]] = measure_accuracy
    unit: str = "accuracy, %"
    note: str = ""  # what the figures should be read with

    def run(self, contender: Contender, size_name: str, size: Size, seed: int, device: str) -> dict:
        """One training, measured: what is kept of it."""
        torch.set_float32_matmul_precision("high")
        model = contender.build(size.shape, seed).to(device)
        trained = train(model, self.make, size.train, size.schedule, seed)
        return {
            "architecture": contender.name,
            "size": size_name,
            "seed": seed,
            "parameters": model.num_parameters(),
            "scores": self.measure(model, self, size),
            **asdict(trained),
            "shape": size.shape,
            "schedule": asdict(size.schedule),
            "train": size.train,
            "examples": size.examples,
            "machine": this_machine(MachineSettings(device=device)),
        }

    def columns_of(self, size_name: str) -> list[str]:
        return list(self.sizes[size_name].tests)


def keep(name: str, run: dict, folder: Path) -> None:
    """Add a run to the experiment's file; it takes the place of an earlier one of the same model, size and seed."""
    identity = ("architecture", "size", "seed")
    runs = [old for old in load(name, folder) or () if any(old[key] != run[key] for key in identity)]
    runs = sorted([*runs, rounded(run)], key=lambda run: [str(run[key]) for key in ("size", "architecture", "seed")])
    write(name, "[\n" + ",\n".join(json.dumps(run) for run in runs) + "\n]", folder)  # a line for each run


def main(experiment: Experiment, arguments: Sequence[str] | None = None) -> None:
    """Run an experiment for the contenders that are named, or for all."""
    parser = argparse.ArgumentParser(f"python -m benchmarks.experiments.{experiment.name}", description=experiment.task)
    parser.add_argument("--architecture", nargs="+", default=[], metavar="NAME", help="default: all")
    parser.add_argument("--size", default="small", choices=list(experiment.sizes), help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="of training; default: those of the size")
    parser.add_argument("--learning-rate", type=float, help="default: that of the size")
    parser.add_argument("--seeds", type=int, help="default: those of the size")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        contenders = chosen(options.architecture)
    except ValueError as error:
        parser.error(str(error))
    size = experiment.sizes[options.size]
    told = {"steps": options.steps, "learning_rate": options.learning_rate}
    schedule = replace(size.schedule, **{name: value for name, value in told.items() if value is not None})
    size = replace(size, schedule=schedule)
    for contender in contenders:
        for seed in range(options.seeds or size.seeds):
            run = experiment.run(contender, options.size, size, seed, options.device)
            keep(experiment.name, run, options.output)
            print(line(run), flush=True)


def line(run: dict) -> str:
    scores = "  ".join(f"{column}: {value:.4g}" for column, value in run["scores"].items())
    return (
        f"{run['architecture']:20} seed {run['seed']}  {run['parameters'] / 1e3:.0f} K  {run['steps']} steps  "
        f"{run['seconds']:.0f} s  loss {run['loss']:.3f}  {scores}"
    )
