"""Contenders take turns, A B A B, so that what disturbs the machine disturbs all of them."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hf_arch.bench.contender import Contender
from hf_arch.bench.floors import floor_seconds
from hf_arch.bench.peers import FORWARD
from hf_arch.bench.process import WorkerFailed
from hf_arch.bench.results import Figure
from hf_arch.bench.settings import Settings


def in_turns(runners: Sequence, rounds: int, sample: Callable) -> list[list]:
    """What `sample` answered for each runner, a round at a time."""
    taken: list[list] = [[] for _ in runners]
    for _ in range(rounds):
        for runner, answers in zip(runners, taken, strict=True):
            answers.append(sample(runner))
    return taken


def median_ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as long they take, by rounds: what slowed one round slowed both."""
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


def weigh(contenders: Sequence[Contender], lengths: dict[str, Sequence[int]]) -> dict[tuple[str, str, int], dict]:
    """(contender, measure, length) -> what its Figure is told: peak memory and operations, or a failure."""
    found = {}
    for contender in contenders:
        for kind in [kind for kind in FORWARD if kind in contender.measures]:
            for length in lengths[kind]:
                try:
                    found[contender.name, kind, length] = contender.weigh(kind, length)
                except WorkerFailed as error:
                    found[contender.name, kind, length] = {"failure": str(error)}
    return found


def race(
    contenders: Sequence[Contender], kind: str, length: int, settings: Settings, known: dict[tuple, dict]
) -> list[Figure]:
    """A figure of each contender that does `kind`; ours comes first. `known` is what `weigh` found."""
    entered = []
    for contender in contenders:
        if kind in contender.measures:
            figure = Figure(contender.name, kind, length, **known.get((contender.name, kind, length), {}))
            entered.append(Entry(contender, figure))
    for entry in entered:
        entry.calls = entry.attempt(entry.contender.warm_up)
    in_turns(entered, settings.rounds, Entry.take_sample)
    for entry in entered:
        entry.close()
    for entry in entered[1:]:
        if entry.figure.samples and entered[0].figure.samples:
            entry.figure.ratio = median_ratio(entry.figure.samples, entered[0].figure.samples)
    return [entry.figure for entry in entered]


@dataclass
class Entry:
    """A contender at one measure and length, until something fails."""

    contender: Contender
    figure: Figure
    calls: int | None = None
    rates: list[dict[str, float]] = field(default_factory=list)

    def attempt(self, what: Callable, *arguments):
        if self.figure.failure is None:
            try:
                return what(self.figure.measure, self.figure.length, *arguments)
            except WorkerFailed as error:
                self.figure.failure = str(error)
        return None

    def take_sample(self) -> None:
        sample = self.attempt(self.contender.sample, self.calls)
        if sample is not None:
            self.figure.samples.append(sample["seconds"])
            self.rates.append(sample["rates"])

    def close(self) -> None:
        """The medians of what was measured."""
        held = self.attempt(self.contender.finish)
        if self.figure.failure is not None:
            self.figure.samples = []
            return
        vars(self.figure).update(held)
        self.figure.seconds = statistics.median(self.figure.samples)
        self.figure.rates = {name: statistics.median(rates[name] for rates in self.rates) for name in self.rates[0]}
        model = self.contender.on_paper
        if model is not None:
            told = self.figure.measure, self.figure.length
            floors = [floor_seconds(model, *told, rates, self.contender.settings.number_bytes) for rates in self.rates]
            self.figure.floor = statistics.median(floors)
            self.figure.times_floor = median_ratio(self.figure.samples, floors)
