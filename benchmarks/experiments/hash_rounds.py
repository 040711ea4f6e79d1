"""Duplication by rounds of hashing (Kitaev et al., 2020, "Reformer", arXiv:2001.04451, section 5 and table 2)."""

import torch
from torch import nn

from benchmarks.experiments import duplication
from benchmarks.experiments.experiment import Experiment, Size, main
from benchmarks.experiments.training import Schedule, accuracy
from hf_arch.modeling.long_context.reformer.modeling_reformer import LSHAttention

ROUNDS = (1, 2, 4, 8)


@torch.no_grad()
def hash_anew(model: nn.Module, rounds: int) -> None:
    """Other rotations, for so many rounds."""
    generator = torch.Generator().manual_seed(rounds)
    for mixer in model.modules():
        if isinstance(mixer, LSHAttention):
            heads, dim, _, axes = mixer.rotations.shape
            drawn = torch.randn(heads, dim, rounds, axes, generator=generator)
            mixer.rotations = drawn.to(mixer.rotations)


def by_rounds(model: nn.Module, experiment: Experiment, size: Size) -> dict[str, float]:
    """In percent, for each number of rounds; what does not hash is as good by any."""
    scores = {}
    for column, arguments in size.tests.items():
        hash_anew(model, int(column))
        scores[column] = 100 * accuracy(model, experiment.make, arguments, size.examples)
    return scores


def size(length: int, symbols: int, shape: dict, schedule: Schedule, examples: int) -> Size:
    told = {"length": length, "symbols": symbols}
    shape = shape | {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": length}
    return Size(shape, schedule, train=told, tests={str(n): told for n in ROUNDS}, examples=examples)


EXPERIMENT = Experiment(
    "hash_rounds",
    "Duplication by rounds of hashing",
    "arXiv:2001.04451",
    "A zero, a random word, a zero: write the word again, with more or fewer rounds of hashing than in training.",
    duplication.make,
    {
        "small": size(
            64,
            15,
            {"vocab_size": 16, "hidden_size": 64, "intermediate_size": 128},
            Schedule(steps=1200, batch=32, learning_rate=2e-3),
            64,
        ),
        "large": size(
            1024,
            127,
            {"vocab_size": 128, "hidden_size": 256, "intermediate_size": 256},
            Schedule(steps=20_000, batch=32, learning_rate=1e-3),
            256,
        ),
    },
    columns="rounds at test",
    published={
        "trained as full attention": {"1": 52.5, "2": 76.9, "4": 92.5, "8": 94.8},
        "trained with 4 rounds": {"1": 91.9, "2": 99.4, "4": 99.9, "8": 100},
        "trained with 2 rounds": {"1": 86.8, "2": 98.1, "4": 99.9, "8": 100},
        "trained with 1 round": {"1": 77.9, "2": 94.8, "4": 99.6, "8": 99.9},
    },
    measure=by_rounds,
    note="What should be seen is the order: more rounds at test are better, and in training, too. Rotations at test "
    "are not those of training.",
)

if __name__ == "__main__":
    main(EXPERIMENT)
