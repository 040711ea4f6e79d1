"""A pass key in filler (Mohtashami and Jaggi, 2023, arXiv:2305.16300, section 4.2), learned from nothing."""

import torch

from benchmarks.experiments.experiment import Experiment, Size, main
from benchmarks.experiments.training import IGNORED, Batch, Schedule

DIGITS, KEY, ASK = 10, 10, 11  # tokens 0-9 are digits
FILLER = range(12, 32)  # one sentence of twenty words, over and over
LENGTH_OF_KEY = 3
VOCABULARY = FILLER.stop


def make(generator: torch.Generator, batch: int, length: int, depth: float | None = None) -> Batch:
    """Filler with KEY and some digits in it, at `depth` (from 0 to 1; None: anywhere); then ASK and the digits."""
    digits = torch.randint(DIGITS, (batch, LENGTH_OF_KEY), generator=generator)
    key = torch.cat((torch.full((batch, 1), KEY), digits), dim=1)
    room = length - 2 * key.shape[1] + 1  # the last digit is an answer, not an input
    start = torch.randint(len(FILLER), (batch, 1), generator=generator)
    tokens = FILLER.start + (start + torch.arange(length)) % len(FILLER)
    place = torch.randint(room + 1, (batch, 1), generator=generator)
    if depth is not None:
        place = torch.full_like(place, round(depth * room))
    tokens = tokens.scatter(1, place + torch.arange(key.shape[1]), key)
    tokens[:, -LENGTH_OF_KEY] = ASK
    tokens[:, -LENGTH_OF_KEY + 1 :] = digits[:, :-1]
    labels = torch.full_like(tokens, IGNORED)
    labels[:, -LENGTH_OF_KEY:] = digits
    return Batch(tokens, labels)


def tests(*lengths: int) -> dict[str, dict]:
    return {
        f"{length} at {depth:.0%}": {"length": length, "depth": depth} for length in lengths for depth in (0, 0.5, 1)
    }


EXPERIMENT = Experiment(
    "passkey",
    "Pass key",
    "arXiv:2305.16300",
    "Three digits after a mark in repeated filler: name them at the end. Columns are lengths and depths in the text.",
    make,
    {
        "small": Size(
            shape={"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128}
            | {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 1024},
            schedule=Schedule(steps=800, batch=32, learning_rate=1e-3),
            train={"length": 64},
            tests=tests(64, 256, 1024),
            examples=64,
        ),
        "large": Size(
            shape={"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256}
            | {"num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 16384},
            schedule=Schedule(steps=20_000, batch=32, learning_rate=1e-3),
            train={"length": 1024},
            tests=tests(1024, 4096, 16384),
        ),
    },
    columns="length at depth",
    note="No numbers are published for models of this size. What must hold: the window finds the key only where it "
    "reaches it. That is at 100 %; trained on keys that are mostly out of its reach, the window of the small size is "
    "right in half of the digits there. Guessing is right in 10 %.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
