"""Measure a causal language model on long texts, and write down what was found."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_arch.bench.results import this_machine
from hf_arch.bench.settings import Settings as MachineSettings
from hf_arch.evaluate.bits import AtContext, AtPositions, Tokens, measure, window_ends
from hf_arch.evaluate.loading import check_fit, choose_lengths, load_model, load_tokenizer, tokenize
from hf_arch.evaluate.passkey import Cell, Prompts, look_for_keys
from hf_arch.evaluate.reading import SAMPLE, Reader
from hf_arch.evaluate.report import Report, estimate, in_words


@dataclass(frozen=True)
class Settings:
    lengths: Sequence[int] = ()  # in tokens; none: from a quarter of the trained length to four times as much
    windows: int = 8  # of the text, of the longest length
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    trials: int = 5  # pass keys for each length and depth; 0: none
    piece: int = 512  # tokens that are read at once
    device: str = "cpu"
    dtype: str = "float32"
    trust_remote_code: bool = False

    def __post_init__(self):
        if self.windows < 1 or self.piece < 1 or self.trials < 0:
            raise ValueError("--windows and --piece are 1 or more, --trials 0 or more.")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError("--depths are between 0, before all other text, and 1, after it.")


def run(
    source: str,
    files: Sequence[str | Path],
    output: str | Path = "hf_arch_evaluation",
    settings: Settings | None = None,
    tokenizer: str | None = None,
) -> Report:
    """Evaluate the model of `source`, a folder or a repository of the Hub, on the text of `files`.

    `output` gets evaluation.json, .md and .png. Raises ValueError or OSError, before anything is measured, for what
    cannot work.
    """
    settings, started, folder = settings or Settings(), time.perf_counter(), Path(output)
    names = load_tokenizer(tokenizer or source)
    text = tokenize(names, files)
    model = load_model(source, settings.device, settings.dtype, settings.trust_remote_code)
    check_fit(model, text)
    lengths = choose_lengths(settings.lengths, model, text)
    folder.mkdir(parents=True, exist_ok=True)
    windows = len(window_ends(len(text.ids), lengths[-1], settings.windows))
    reader = Reader(model, settings.piece)
    reader.check(text.ids[None, :SAMPLE])
    positions, contexts, cells = measure_all(reader, text, Prompts(names, text.prefix), lengths, windows, settings)
    report = Report(
        model=source,
        model_type=model.config.model_type,
        parameters=model.num_parameters(),
        trained_length=getattr(model.config, "max_position_embeddings", None),
        text={"files": [Path(file).name for file in files], "bytes": text.size, "tokens": len(text.ids)},
        settings=vars(settings) | {"lengths": lengths, "windows": windows, "measured_tokens": lengths[0] // 2},
        read_in_pieces=reader.in_pieces,
        by_position=positions,
        by_context=contexts,
        passkey=cells,
        machine=this_machine(MachineSettings(device=settings.device)),
        seconds=time.perf_counter() - started,
    )
    report.save(folder)
    return report


def measure_all(
    reader: Reader, text: Tokens, prompts: Prompts, lengths: Sequence[int], windows: int, settings: Settings
) -> tuple[list[AtPositions], list[AtContext], list[Cell]]:
    """Everything, each figure shown when it is there."""
    positions, contexts = measure(reader, text, lengths, windows)
    for at in contexts:
        print(f"{at.length:8,} tokens  {estimate(at)} bits per byte", flush=True)
    cells = []
    for cell in look_for_keys(reader, prompts, lengths, settings.depths, settings.trials):
        cells.append(cell)
        print(f"{cell.length:8,} tokens  pass key at {cell.depth:4.0%}: {in_words(cell)}", flush=True)
    return positions, contexts, cells
