"""What is measured: a model and how it is called."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

ANSWER = 64  # tokens that a pass of an encoder-decoder names, of whatever source


class Subject:
    """A language model of a library. A subclass builds `self.model` and says how to call it.

    shape: `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `intermediate_size`, `vocab_size`.
    longest: the most tokens that it will have to hold.
    """

    model: nn.Module

    def __init__(self, shape: dict, longest: int, **options):
        raise NotImplementedError

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """[1, length] -> [1, length, vocabulary], without a cache."""
        raise NotImplementedError

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.logits(ids)
        return F.cross_entropy(logits[0, :-1].float(), ids[0, 1:])

    def begin(self, ids: torch.Tensor, room: int) -> object:
        """What the model remembers after `ids`, with room for so many tokens more."""
        raise NotImplementedError

    def step(self, token: torch.Tensor, memory: object) -> object:
        """Name the token after `token` [1, 1]; the memory afterwards."""
        raise NotImplementedError

    def generate(self, ids: torch.Tensor, new_tokens: int) -> float:
        """Seconds per token of the library's own greedy generation, those of the prompt left out."""
        raise NotImplementedError

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def held_bytes(memory: object) -> int:
    """Memory that the tensors within `memory` keep occupied, each storage once."""
    return sum(
        {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors(memory)}.values()
    )


def tensors(memory: object) -> Iterator[torch.Tensor]:
    """Every tensor that can be reached through containers and attributes."""
    waiting, seen = [memory], set()
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, (type, nn.Module)):
            continue
        seen.add(id(found))
        if isinstance(found, torch.Tensor):
            yield found
        elif isinstance(found, dict):
            waiting += found.values()
        elif isinstance(found, (list, tuple)):
            waiting += found
        elif hasattr(found, "__dict__"):
            waiting += vars(found).values()
