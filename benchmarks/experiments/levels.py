"""Where a hierarchy wins: two levels beside three, over the length of the text, and a dialogue turn by turn."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.experiments.record import RESULTS, write
from hf_arch import find
from hf_arch.bench.results import rounded, this_machine
from hf_arch.bench.settings import Settings

NAME = "levels"
SHAPE = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
TWO, THREE = [16], [16, 64]  # tokens of a sentence, sentences of a paragraph
LAYOUTS = {
    "two": (TWO, ["level_0", "level_1", "level_1", "level_0"]),
    "three": (THREE, ["level_0", "level_1", "level_2", "level_0"]),
    "two, top down": (TWO, ["level_0", "level_1", "level_1", "down_1"]),
    "three, top down": (THREE, ["level_0", "level_1", "level_2", "down_1", "down_2"]),
}
TURN, TURNS = 128, (2, 10)


def model(lengths: list[int], layers: list[str], longest: int):
    row = find("hat")
    told = {"segment_lengths": lengths, "layer_types": layers, "num_hidden_layers": len(layers)}
    return row.load("Model")(row.load("Config")(**SHAPE, **told, max_position_embeddings=longest)).eval()


def in_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of processor time of a call: the median."""
    found = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            before = time.process_time()
            run()
            if number:  # the first warms up
                found[name].append(time.process_time() - before)
    return {name: statistics.median(times) for name, times in found.items()}


@torch.no_grad()
def by_length(length: int, rounds: int) -> dict[str, float]:
    ids = torch.randint(SHAPE["vocab_size"], (1, length))
    models = {name: model(*layout, length) for name, layout in LAYOUTS.items()}
    return in_turns({name: lambda each=each: each(ids) for name, each in models.items()}, rounds)


@torch.no_grad()
def by_turn(rounds: int) -> dict[str, float]:
    reader = model([TURN], ["level_0"] * 3 + ["level_1"], TURN * max(TURNS))
    turn, states, state = torch.randint(SHAPE["vocab_size"], (1, TURN)), {}, None
    for number in range(1, max(TURNS) + 1):
        states[number] = state
        state = reader.read_turn(state, turn)[1]
    runs = {str(number): lambda number=number: reader.read_turn(states[number], turn) for number in TURNS}
    runs["whole"] = lambda: reader(turn.repeat(1, max(TURNS)))
    return in_turns(runs, rounds)


def section(found: dict | None) -> str:
    """Of the page of experiments."""
    parts = [
        "## Two levels and three",
        f"A text is read by HAT in sentences of {TWO[0]} tokens: by two levels, whose sentences all meet, or by three, "
        f"whose sentences meet in paragraphs of {THREE[1]} and these in the document; and the same from the top down, "
        "where each token also asks the sentences of the document, or those of its paragraph and its paragraphs. "
        "Seconds of a pass. [arXiv:2210.05529](https://arxiv.org/abs/2210.05529), "
        "[arXiv:2203.07586](https://arxiv.org/abs/2203.07586)",
    ]
    if found is None:
        return "\n\n".join([*parts, f"Not run yet: `python -m benchmarks.experiments.{NAME}`."])
    lines = [f"| tokens | {' | '.join(LAYOUTS)} |", f"| --: |{' --: |' * len(LAYOUTS)}"]
    for length, at in found["seconds"].items():
        lines.append(f"| {length} | {' | '.join(f'{at[name]:.2f}' for name in LAYOUTS)} |")
    machine, turns = found["machine"], found["turns"]
    second, last, whole = (1000 * turns[name] for name in (*map(str, TURNS), "whole"))
    dialogue = (
        f"A dialogue of turns of {TURN} tokens, by two levels, three layers inside turns and one across: turn "
        f"{TURNS[0]} takes {second:.1f} ms, turn {TURNS[1]} takes {last:.1f} ms ({last / second:.2f} times), to read "
        f"all {TURNS[1]} anew {whole:.0f} ms."
    )
    made = (
        f"Width {SHAPE['hidden_size']}, {SHAPE['num_attention_heads']} heads, random weights, one thread, processor "
        f"time, medians of {found['rounds']}; {machine['processor']}, torch {machine['torch']}, {machine['date']}."
    )
    return "\n\n".join([*parts, "\n".join(lines), dialogue, made])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(f"python -m benchmarks.experiments.{NAME}", description=__doc__)
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384, 65536], help="default: 4k, 16k, 64k")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {"rounds": options.rounds, "machine": this_machine(Settings()), "turns": by_turn(5 * options.rounds)}
    found["seconds"] = {}
    for length in options.lengths:
        found["seconds"][str(length)] = at = by_length(length, options.rounds)
        print(f"{length:6}  " + "  ".join(f"{name} {seconds:.2f} s" for name, seconds in at.items()), flush=True)
    write(NAME, json.dumps(rounded(found)), options.output)


if __name__ == "__main__":
    main()
