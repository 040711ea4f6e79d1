"""Bits per byte of held-out text by context length and by position: does a longer context help, and how far?"""

import functools

import torch
from torch import nn

from benchmarks.experiments.experiment import Experiment, Size, main
from benchmarks.experiments.training import Batch, Schedule
from hf_arch.demo.text import python_manual, split
from hf_arch.evaluate.bits import Tokens, measure
from hf_arch.evaluate.reading import Reader

END = 0  # after each document; a text holds no zero byte
WINDOWS = 16


@functools.cache
def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of Python's manual: those to learn, those held out."""
    corpus = split("the manual", python_manual())
    return tuple(
        torch.tensor(list(b"".join(document.text.encode() + b"\0" for document in documents)))
        for documents in (corpus.train, corpus.held_out)
    )


def make(generator: torch.Generator, batch: int, length: int) -> Batch:
    """Windows of the text, anywhere in it; each byte is asked for from those before it."""
    text = texts()[0]
    start = torch.randint(len(text) - length, (batch, 1), generator=generator)
    window = text[start + torch.arange(length + 1)]
    return Batch(window[:, :-1], window[:, 1:])


def measure_bits(model: nn.Module, experiment: Experiment, size: Size) -> dict[str, float]:
    """By context length over the same bytes, then by position in the longest windows."""
    held_out = texts()[1]
    lengths = [arguments["length"] for arguments in size.tests.values() if "length" in arguments]
    reader = Reader(model)
    reader.check(held_out[None])
    positions, contexts = measure(reader, Tokens(held_out, len(held_out)), lengths, WINDOWS)
    found = {str(at.length): at.bits_per_byte for at in contexts}
    return found | {f"at {at.first}-{at.last}": at.bits_per_byte for at in positions}


def columns(first: int, last: int) -> dict[str, dict]:
    lengths = {str(2**power): {"length": 2**power} for power in range(first, last + 1)}
    edges = [1, *(2**power for power in range(4, last + 1))]
    return lengths | {f"at {start}-{end - 1}": {} for start, end in zip(edges[:-1], edges[1:], strict=True)}


EXPERIMENT = Experiment(
    "context",
    "Bits per byte by context and by position",
    "arXiv:2108.12409",
    "A small model of bytes learns Python's manual. Columns `64`, `128`, ...: the last 32 bytes (large: 64) of at "
    "most 16 windows of held-out text, the same for each context length; `at ...`: by position in the longest windows.",
    make,
    {
        "small": Size(
            shape={"vocab_size": 256, "hidden_size": 96, "intermediate_size": 256}
            | {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 2048},
            schedule=Schedule(steps=600, batch=8, learning_rate=3e-3),
            train={"length": 256},
            tests=columns(6, 11),
        ),
        "large": Size(
            shape={"vocab_size": 256, "hidden_size": 512, "intermediate_size": 1408}
            | {"num_hidden_layers": 6, "num_attention_heads": 8, "max_position_embeddings": 16384},
            schedule=Schedule(steps=3000, batch=32, learning_rate=6e-4),
            train={"length": 1024},
            tests=columns(7, 13),
        ),
    },
    columns="bytes",
    measure=measure_bits,
    unit="bits per byte",
    note="Published as claims, not as numbers for this text: with ALiBi, text longer than trained costs no more "
    "(arXiv:2108.12409); a recurrence reads on at any length; rotary positions fail past the trained length. A window "
    "of 16 is no worse at the small size: a model so small, trained for so short, has learned from near text alone.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
