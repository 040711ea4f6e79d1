"""Evaluation with a memory beside evaluation with a window that slides (Dai et al., 2019, arXiv:1901.02860, section
4.4 and table 9)."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache

from benchmarks.experiments.record import RESULTS, write
from hf_arch import find
from hf_arch.bench.results import rounded, this_machine
from hf_arch.bench.settings import Settings

NAME = "evaluation_speed"
SEGMENT = 128  # tokens that the memory model reads at once
PUBLISHED = {800: 363, 1800: 773, 2800: 1409, 3800: 1874}  # times faster, by attention length
SHAPE = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 1024}
SHAPE |= {"num_hidden_layers": 4, "num_attention_heads": 4}


def window(length: int) -> tuple[Callable[[], object], int]:
    """A Transformer that names one more token: it reads the `length` tokens before it anew. And for how many tokens."""
    row = find("transformer")
    model = row.load("ForCausalLM")(row.load("Config")(**SHAPE, max_position_embeddings=length)).eval()
    ids = torch.randint(SHAPE["vocab_size"], (1, length))
    return lambda: model(ids, logits_to_keep=1, use_cache=False), 1


def memory(length: int) -> tuple[Callable[[], object], int]:
    """Transformer-XL, which reads a segment more, with a memory of what is left of `length`."""
    row = find("transformer_xl")
    config = row.load("Config")(**SHAPE, segment_length=SEGMENT, memory_length=length - SEGMENT)
    model = row.load("ForCausalLM")(config).eval()
    cache = DynamicCache(config=config)
    ids = torch.randint(SHAPE["vocab_size"], (1, SEGMENT))
    for _ in range(-(-length // SEGMENT)):
        model(ids, past_key_values=cache, logits_to_keep=1)
    return lambda: model(ids, past_key_values=cache), SEGMENT


@torch.no_grad()
def measure(length: int, rounds: int) -> dict[str, float]:
    """Milliseconds of processor time for a token, in turns: the median."""
    found = {"window": [], "memory": []}
    ready = {"window": window(length), "memory": memory(length)}
    for number in range(rounds + 1):
        for name, (run, tokens) in ready.items():
            before = time.process_time()
            run()
            if number:  # the first warms up
                found[name].append(1000 * (time.process_time() - before) / tokens)
    return {name: statistics.median(times) for name, times in found.items()}


def section(found: dict | None) -> str:
    """Of the page of experiments."""
    parts = [
        "## Evaluation with a memory",
        "Name every token of a text, each from as many tokens before it: a Transformer reads them all anew for each, "
        f"Transformer-XL reads {SEGMENT} tokens at once and remembers the rest. Milliseconds for a token, and how many "
        "times faster the memory is. [arXiv:1901.02860](https://arxiv.org/abs/1901.02860)",
    ]
    if found is None:
        return "\n\n".join([*parts, f"Not run yet: `python -m benchmarks.experiments.{NAME}`."])
    lines = ["| attention length | window | memory | times | published |", "| --: | --: | --: | --: | --: |"]
    for length, at in found["milliseconds"].items():
        published = PUBLISHED.get(int(length), "")
        times = at["window"] / at["memory"]
        lines.append(f"| {length} | {at['window']:.0f} | {at['memory']:.2f} | {times:.0f} | {published} |")
    machine = found["machine"]
    made = (
        f"{SHAPE['num_hidden_layers']} layers, width {SHAPE['hidden_size']}, {SHAPE['num_attention_heads']} heads, "
        f"random weights, one thread, processor time, medians of {found['rounds']}; {machine['processor']}, "
        f"torch {machine['torch']}, {machine['date']}. Published: a GPU, larger models of 2018."
    )
    return "\n\n".join([*parts, "\n".join(lines), made])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(f"python -m benchmarks.experiments.{NAME}", description=__doc__)
    parser.add_argument("--lengths", nargs="+", type=int, default=list(PUBLISHED), help="default: those of the paper")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if min(options.lengths) <= SEGMENT:
        parser.error(f"a length must be more than the {SEGMENT} tokens of a segment")
    torch.set_num_threads(1)
    found = {"rounds": options.rounds, "machine": this_machine(Settings()), "milliseconds": {}}
    for length in options.lengths:
        found["milliseconds"][str(length)] = at = measure(length, options.rounds)
        print(f"{length:6}  window {at['window']:.0f} ms  memory {at['memory']:.2f} ms a token", flush=True)
    write(NAME, json.dumps(rounded(found)), options.output)


if __name__ == "__main__":
    main()
