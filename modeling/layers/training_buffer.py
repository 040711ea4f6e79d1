"""State that training changes by a rule of its own, not by a gradient: centroids, router biases, redrawn features.

A module that has such state derives from `TrainingBuffer`, tells it in forward what was seen (`observe`), and says how
the buffer changes (`update`). The change happens once per optimizer step, at the start of the next forward pass in
training, whatever loop or trainer drives it: a step is noticed by the version counters of the parameters, which every
in-place update raises. Gradient accumulation therefore adds up, recomputation in backward and evaluation count for
nothing, and all processes change alike, since what was seen is summed over them. The buffer is saved with the model.
"""

import torch
import torch.distributed as dist
from torch import nn


class TrainingBuffer(nn.Module):
    """A persistent tensor `value`, and the sum of what was observed since the last optimizer step."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.register_buffer("value", value)
        self.seen: torch.Tensor | None = None
        self.version: int | None = None  # of the parameters when `seen` was begun

    def observe(self, statistic: torch.Tensor) -> None:
        """Add to what was seen. Nothing in evaluation, without gradients, or when backward computes anew."""
        in_backward = torch._C._current_graph_task_id() != -1
        if self.training and torch.is_grad_enabled() and not in_backward:
            statistic = statistic.detach()
            self.seen = statistic if self.seen is None else self.seen + statistic

    def update(self, value: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """The next value, from the present one and the sum of what all processes saw."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.seen)
        self.value.copy_(self.update(self.value, self.seen))
        self.seen = None


def update_training_buffers(model: nn.Module) -> None:
    """Called at the start of each forward pass in training: change the buffers if an optimizer has stepped."""
    buffers = [module for module in model.modules() if isinstance(module, TrainingBuffer)]
    if not buffers:
        return
    version = sum(parameter._version for parameter in model.parameters())
    for buffer in buffers:
        if buffer.seen is not None and buffer.version != version:
            buffer.step()
        buffer.version = version
