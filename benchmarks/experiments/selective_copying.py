"""Selective copying (Gu and Dao, 2023, arXiv:2312.00752, section 4.1.1 and table 1): leave out the noise."""

import torch

from benchmarks.experiments.experiment import Experiment, Size, main
from benchmarks.experiments.training import IGNORED, Batch, Schedule

VOCABULARY, NOISE, WRITE = 16, 0, 1  # the other 14 tokens are data


def make(generator: torch.Generator, batch: int, length: int, copied: int) -> Batch:
    """`length` tokens, all noise but `copied` of them; then as many marks, where these are asked for, in order."""
    data = torch.randint(2, VOCABULARY, (batch, copied), generator=generator)
    place = torch.rand(batch, length, generator=generator).argsort(-1)[:, :copied].sort(-1).values
    tokens = torch.full((batch, length + copied), NOISE).scatter(1, place, data)
    tokens[:, length:] = WRITE
    labels = torch.full_like(tokens, IGNORED)
    labels[:, length:] = data
    return Batch(tokens, labels)


EXPERIMENT = Experiment(
    "selective_copying",
    "Selective copying",
    "arXiv:2312.00752",
    "Data tokens stand scattered among noise: write them in order, without the noise.",
    make,
    {
        "small": Size(
            shape={"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128}
            | {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512},
            schedule=Schedule(steps=1200, batch=32, learning_rate=2e-3),
            train={"length": 32, "copied": 4},
            tests={f"{length}, 4": {"length": length, "copied": 4} for length in (32, 64, 128)},
        ),
        "large": Size(
            shape={"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128}
            | {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 8192},
            schedule=Schedule(steps=50_000, batch=64, learning_rate=1e-3),
            train={"length": 4096, "copied": 16},
            tests={f"{length}, {copied}": {"length": length, "copied": copied} for length, copied in ((4096, 16),)},
        ),
    },
    columns="length, copied",
    published={
        "S4, no gate (400,000 steps)": {"4096, 16": 18.3},
        "S6, no gate": {"4096, 16": 97.0},
        "S4 in H3's block": {"4096, 16": 57.0},
        "Hyena in H3's block": {"4096, 16": 30.1},
        "S6 in H3's block": {"4096, 16": 99.7},
        "S4 in Mamba's block": {"4096, 16": 56.4},
        "Hyena in Mamba's block": {"4096, 16": 28.4},
        "Mamba": {"4096, 16": 99.8},
    },
    note="The small size copies 4 of 32 tokens: who learns this length need not have learned to skip noise at another. "
    "Guessing is right in 7 % (1 of 14).",
)

if __name__ == "__main__":
    main(EXPERIMENT)
