"""Multi-query associative recall (Arora et al., 2023, "Zoology", arXiv:2312.04927, section 3 and figure 2)."""

import torch

from benchmarks.experiments.experiment import Experiment, Size, main
from benchmarks.experiments.training import IGNORED, Batch, Schedule

NEARNESS = 0.01  # exponent of the power law by which queries come soon after the pairs


def make(generator: torch.Generator, batch: int, length: int, pairs: int, vocabulary: int) -> Batch:
    """Pairs of a key and a value; then the keys again, each once, zeros between them: name their values there.

    Keys are of the first half of the vocabulary, values of the second, 0 is nothing.
    """
    half = vocabulary // 2
    keys = 1 + different(generator, batch, half - 1, pairs)
    values = half + different(generator, batch, half, pairs)
    space = (length - 2 * pairs) // 2
    nearness = NEARNESS * torch.arange(1, space + 1.0) ** (NEARNESS - 1)
    place = torch.multinomial(nearness.expand(batch, -1), pairs, generator=generator)
    place = 2 * place + 2 * pairs
    tokens = torch.zeros(batch, length, dtype=torch.long)
    tokens[:, : 2 * pairs] = torch.stack((keys, values), dim=-1).flatten(1)
    labels = torch.full_like(tokens, IGNORED).scatter(1, place, values)
    return Batch(tokens.scatter(1, place, keys), labels)


def different(generator: torch.Generator, batch: int, kinds: int, count: int) -> torch.Tensor:
    """Rows of `count` different numbers below `kinds`."""
    return torch.rand(batch, kinds, generator=generator).argsort(-1)[:, :count]


SMALL = {"length": 32, "pairs": 4, "vocabulary": 64}
LARGE = {
    f"{length}, {pairs}": {"length": length, "pairs": pairs, "vocabulary": 8192}
    for length, pairs in ((64, 4), (128, 8), (256, 16), (512, 64))
}
WIDTH_64 = {
    "attention": (100, 100, 100, 100),
    "Hyena": (52, 18, 5, 2),
    "RWKV-4": (76, 18, 5, 1),
    "H3": (93, 25, 8, 1),
    "BaseConv": (70, 37, 14, 2),
}
EXPERIMENT = Experiment(
    "recall",
    "Multi-query associative recall",
    "arXiv:2312.04927",
    "Pairs of a key and a value, then the keys in another order: name the value of each.",
    make,
    {
        "small": Size(
            shape={"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
            | {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128},
            schedule=Schedule(steps=1000, batch=64, learning_rate=2e-3),
            train=SMALL,
            tests={
                f"{length}, {pairs}": SMALL | {"length": length, "pairs": pairs}
                for length, pairs in ((32, 4), (64, 4), (128, 4), (64, 8))
            },
            seeds=3,
        ),
        "large": Size(
            shape={"vocab_size": 8192, "hidden_size": 64, "intermediate_size": 64}
            | {"num_hidden_layers": 2, "num_attention_heads": 1, "max_position_embeddings": 512},
            schedule=Schedule(steps=12_500, batch=512, learning_rate=2e-3, solved=0.0),
            train=LARGE["64, 4"],
            tests=LARGE,
            examples=3000,
            seeds=3,
        ),
    },
    columns="length, pairs",
    published={
        f"{who} (width 64, vocabulary 8192, trained for the column)": dict(zip(LARGE, found, strict=True))
        for who, found in WIDTH_64.items()
    },
    note="Trained on the first column alone, while the published models train on each column and keep the best of four "
    "learning rates; their figures are read off a plot (± 2). Ours have feed-forwards, theirs none. The small size has "
    "64 tokens in place of 8192. Most queries come soon: of the columns of the small size 100, 78, 64 and 73 % of the "
    "answers stand within the 30 tokens that two layers with a window of 16 reach, and the window finds no more than "
    "these and its guesses. Loss stays where all values of the row are as likely (1.39 nats) for hundreds of steps "
    "before it falls, so that a model that has not learned the task in this time may learn it in more.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
