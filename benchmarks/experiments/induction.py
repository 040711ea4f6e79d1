"""Induction heads (Gu and Dao, 2023, arXiv:2312.00752, section 4.1.2 and table 11): what followed the mark?"""

import torch

from benchmarks.experiments.experiment import Experiment, Size, main
from benchmarks.experiments.training import IGNORED, Batch, Schedule

VOCABULARY = 16  # the mark is the last token


def make(generator: torch.Generator, batch: int, length: int) -> Batch:
    """Random tokens with the mark somewhere and at the end, where the token after the first mark is asked for."""
    tokens = torch.randint(VOCABULARY - 1, (batch, length), generator=generator)
    place = torch.randint(length - 2, (batch, 1), generator=generator)
    tokens.scatter_(1, place, VOCABULARY - 1)
    tokens[:, -1] = VOCABULARY - 1
    labels = torch.full_like(tokens, IGNORED)
    labels[:, -1] = tokens.gather(1, place + 1).squeeze(1)
    return Batch(tokens, labels)


def lengths(first: int, last: int) -> dict[str, dict]:
    return {str(2**power): {"length": 2**power} for power in range(first, last + 1)}


COLUMNS = [str(2**power) for power in (8, 9, 10, 11, 12, 14)]
EXPERIMENT = Experiment(
    "induction",
    "Induction heads",
    "arXiv:2312.00752",
    "Random tokens of 16 kinds hold a mark once; when the mark comes again, name the token that followed it.",
    make,
    {
        "small": Size(
            shape={"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128}
            | {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 2**11},
            schedule=Schedule(steps=1000, batch=32, learning_rate=1e-3),
            train={"length": 32},
            tests=lengths(5, 11),
            examples=128,
        ),
        "large": Size(
            shape={"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256}
            | {"num_hidden_layers": 2, "num_attention_heads": 8, "max_position_embeddings": 2**14},
            schedule=Schedule(steps=200_000, batch=8, learning_rate=2e-4, cosine=False, solved=0.0),
            train={"length": 256},
            tests=lengths(6, 14),
        ),
    },
    published={
        "attention, learned positions (137 K, 204,800 steps)": dict(
            zip(COLUMNS, (100, 58.6, 26.6, 18.8, 9.8, 7.8), strict=True)
        ),
        "attention, RoPE (137 K, 409,600 steps)": dict(zip(COLUMNS, (100, 83.6, 31.3, 18.4, 8.6, 5.5), strict=True)),
        "attention, xPos (137 K, 409,600 steps)": dict(zip(COLUMNS, (100, 99.6, 67.6, 25.4, 7.0, 7.8), strict=True)),
        "H3 (153 K, 81,920 steps)": dict(zip(COLUMNS, (100, 80.9, 39.5, 23.8, 14.8, 5.9), strict=True)),
        "Hyena (81,920 steps)": dict(zip(COLUMNS, (100, 100, 44.1, 12.5, 6.6, 7.0), strict=True)),
        "Mamba (74 K, 204,800 steps)": dict.fromkeys(COLUMNS, 100),
    },
    note="Published models train at length 256, the small size at 32: compare lengths as multiples of the trained one. "
    "Two layers with a window of 16 reach 30 tokens back, so that length 32 is nearly within reach of the window; from "
    "64 on the mark is mostly out of it. Guessing is right in 7 % (1 of 15).",
)

if __name__ == "__main__":
    main(EXPERIMENT)
