"""A model in a race: the worker that holds it, and what it can and cannot do."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from hf_arch.architecture import Architecture
from hf_arch.bench.environments import python_of
from hf_arch.bench.floors import on_paper
from hf_arch.bench.peers import DECODE, FORWARD, Peer
from hf_arch.bench.process import Worker, WorkerFailed, Workers
from hf_arch.bench.results import exponent
from hf_arch.bench.settings import ANSWERING, MEASURED_AS, Settings

SUBJECTS = {"EncoderModel": "hugging_face:OurEncoder", "ForConditionalGeneration": "hugging_face:OurReader"}
START_SECONDS = 900  # to import and build, on a machine that does much else


@dataclass
class Contender:
    name: str
    measures: Sequence[str]
    workers: Workers
    worker: Worker
    settings: Settings
    on_paper: nn.Module | None = None  # of ours: what its floor is computed from
    parameters: int = 0
    history: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # measure -> (length, seconds of a call)

    def build(self, subject: str, **options) -> None:
        """Begin to build; `ready` waits for it, so that several can do so at once."""
        settings = self.settings
        told = {"shape": settings.shape, "longest": settings.longest, "device": settings.device}
        self.worker.send("build", subject=subject, dtype=settings.dtype, threads=settings.threads, **(told | options))

    def ready(self) -> None:
        try:
            self.parameters = self.worker.receive("build", START_SECONDS)["parameters"]
        except WorkerFailed as error:
            raise OSError(f"{self.name} cannot be measured: {error}") from error

    def close(self) -> None:
        self.workers.dismiss(self.worker)

    def ask(self, do: str, **request) -> dict:
        return self.worker.ask(do, limit=4 * self.settings.limit + 60, **request)

    def weigh(self, kind: str, length: int) -> dict:
        """Peak memory, and operations, of one pass. Before anything is timed, in a process that is still small."""
        self.refuse_what_takes_too_long(kind, length)
        answer = self.ask("weigh", measure=kind, length=length)
        self.history.setdefault(kind, []).append((length, answer.pop("seconds")))
        return answer

    def warm_up(self, kind: str, length: int) -> int:
        """Run once, which makes the memory that steps go on from; how many calls make a sample."""
        self.refuse_what_takes_too_long("forward" if kind in DECODE else kind, length)
        if kind in DECODE:
            self.sample(kind, length, self.settings.steps)
            return self.settings.steps
        seconds = self.sample(kind, length, 1)["seconds"]
        return max(1, min(50, round(self.settings.sample_seconds / seconds)))

    def sample(self, kind: str, length: int, calls: int) -> dict:
        """{"seconds": of a call, "rates": of the machine}"""
        room = {"room": self.settings.room} if kind == "step" else {}
        return self.ask("time", measure=kind, length=length, calls=calls, **room)

    def finish(self, kind: str, length: int) -> dict:
        return self.ask("forget", length=length) if kind == "step" else {}

    def refuse_what_takes_too_long(self, kind: str, length: int) -> None:
        """By how the time of shorter passes grew; a step is preceded by a pass over its context."""
        known = self.history.get(kind, [])
        if not known:
            return
        power = exponent(*zip(*known, strict=True)) if len(known) > 1 else 2.0
        longest, after = known[-1]
        seconds = after * (length / longest) ** min(max(power, 1.0), 2.5)
        if seconds > self.settings.limit:
            raise WorkerFailed(f"would take about {seconds:.0f} s")


def start(row: Architecture, peers: Sequence[Peer], settings: Settings, workers: Workers) -> list[Contender]:
    """The row and its peers, each being built in a process of its own. Ours comes first."""
    fields = MEASURED_AS[row.name](settings.shape) if row.name in MEASURED_AS else {}
    model = on_paper(row, head_of(row), settings.shape | fields)
    measures = FORWARD + DECODE if head_of(row) in ("ForCausalLM", "ForConditionalGeneration") else FORWARD
    ours = Contender(row.name, measures, workers, workers.hire(python_of(None)), settings, model)
    ours.build(SUBJECTS.get(head_of(row), "hugging_face:Ours"), row=row.name, head=head_of(row), fields=fields)
    contenders = [ours]
    for peer in peers:
        worker = workers.hire(python_of(peer.environment))
        contenders.append(Contender(peer.name, peer.measures, workers, worker, settings))
        contenders[-1].build(peer.subject, **peer.options)
    return contenders


def head_of(row: Architecture) -> str | None:
    """The first head that makes the row a language model, if it has one; of an encoder-decoder, its encoder, or all
    of it where that is to be measured."""
    if row.name in ANSWERING:
        return "ForConditionalGeneration"
    return next((head for head in row.heads if head in ("ForCausalLM", "ForMaskedLM", "EncoderModel")), None)
