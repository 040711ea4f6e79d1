"""Measure rows of the catalogue and their peers, in turns, and write down what was found."""

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from hf_arch.architecture import Architecture
from hf_arch.bench import report
from hf_arch.bench.contender import head_of, start
from hf_arch.bench.environments import python_of
from hf_arch.bench.peers import DECODE, Peer, chosen_peers
from hf_arch.bench.process import Workers
from hf_arch.bench.race import race, weigh
from hf_arch.bench.results import Result, load, this_machine
from hf_arch.bench.settings import MEASURES, UNBOUNDED_CONTEXT, Settings, settings_for
from hf_arch.catalogue import ARCHITECTURES, find


def run(
    rows: Iterable[str] = (),
    peers: Iterable[str] | None = None,
    output: str | Path = "hf_arch_bench",
    settings: Settings | None = None,
) -> list[Result]:
    """Measure `rows` (all of them if there are none) and those of their `peers` that are named (no names: all).

    `output` gets a JSON file and a picture for each row, and a page of all that the folder holds.
    """
    settings, chosen = settings or settings_for(), [find(name) for name in rows]
    for row in chosen:
        if head_of(row) is None:
            raise ValueError(f"{row.name} is no language model: it has no head that bench could measure.")
    chosen = chosen or [row for row in ARCHITECTURES if head_of(row)]
    their_peers = chosen_peers(peers, chosen)
    for peer in their_peers:
        python_of(peer.environment)  # made now, and not between measurements
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    warn_if_busy()
    results = []
    with closing(Workers(settings.threads)) as workers:
        for row in chosen:
            path = measure(row, [peer for peer in their_peers if peer.row == row.name], settings, workers).save(folder)
            results.append(Result.load(path))
            report.write(results[-1:], folder)  # at once: an interruption loses no row that was finished
            print(f"\n{report.growth(results[-1])}\n")
    print(f"{report.summary(results)}\n\nEverything is in {folder}")
    return results


def warn_if_busy() -> None:
    load, cores = os.getloadavg()[0], os.cpu_count()
    if load > cores / 2:
        print(f"This machine is busy (load {load:.1f} on {cores} cores): trust ratios, not seconds.", flush=True)


def measure(row: Architecture, peers: Sequence[Peer], settings: Settings, workers: Workers) -> Result:
    """Everything about one row, beside its peers."""
    machine, figures = this_machine(settings), []
    lengths = {kind: lengths_of(kind, row, settings) for kind in MEASURES}
    with ExitStack() as stack:
        contenders = [stack.enter_context(closing(contender)) for contender in start(row, peers, settings, workers)]
        for contender in contenders:
            contender.ready()
        known = weigh(contenders, lengths)
        for kind in MEASURES:
            for length in lengths[kind]:
                for figure in race(contenders, kind, length, settings, known):
                    figures.append(figure)
                    print(report.line(figure), flush=True)
    parameters = {contender.name: contender.parameters for contender in contenders}
    return Result(row.name, machine, settings.as_dict(), parameters, figures)


def lengths_of(kind: str, row: Architecture, settings: Settings) -> list[int]:
    bounded = kind not in DECODE or "bounded state" not in row.exceptions
    return [length for length in settings.lengths[kind] if bounded or length <= UNBOUNDED_CONTEXT]


def render(folder: str | Path, readme: str | Path) -> None:
    """Write the page and the pictures of `folder` again, and its summary between the marks in `readme`."""
    results = load(Path(folder))
    if not results:
        raise FileNotFoundError(f"{folder} holds no results: `hf-arch bench --output {folder}` measures some.")
    report.write(results, Path(folder))
    page = Path(readme)
    page.write_text(report.between_marks(page.read_text(), report.summary(results)))
