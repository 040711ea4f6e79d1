"""State that training changes by a rule of its own, not by a gradient: centroids, router biases, redrawn features.

A module that has such state derives from `TrainingBuffer`, tells it in forward what was seen (`observe`), and says how
the buffer changes (`update`). It changes right after each step of an optimizer that trains weights of the model,
whatever loop or trainer drives it, so that a checkpoint made after a step is whole. Gradient accumulation therefore
adds up, and evaluation and recomputation in backward count for nothing. All processes change alike, since what they saw
is summed; those that share a batch (tensor parallel) each count it, so `update` should rest on ratios and signs. A
buffer stays as it is while only adapters train, which are saved without it.

The step is noticed by torch's hook for all optimizers, the one sign that they share: fused ones, those that write to
`.data` and sharded parameters raise no version counter. DeepSpeed steps on copies of the parameters: there, call
`update_training_buffers(model)` after each step.
"""

import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class TrainingBuffer(nn.Module):
    """A persistent tensor `value`, and the sum of what was observed since the last optimizer step."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.register_buffer("value", value)
        # What was seen is no buffer: DistributedDataParallel would send that of one process to all
        self.seen: torch.Tensor | None = None
        self.watching = False  # whether the forward pass under way is one that backward will go through

    @property
    def learning(self) -> bool:
        """Whether `observe` counts: not in evaluation, nor when backward computes anew."""
        in_backward = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        return self.training and self.watching and not in_backward

    def observe(self, statistic: torch.Tensor) -> None:
        """Add to what was seen, in every process alike, where there is `learning`."""
        if self.learning:
            statistic = statistic.detach().to(torch.promote_types(statistic.dtype, torch.float32))
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


def training_buffers(model: nn.Module) -> list[TrainingBuffer]:
    return [module for module in model.modules() if isinstance(module, TrainingBuffer)]


def watch_training_buffers(model: nn.Module) -> None:
    """Called at the start of each forward pass in training. Here, since reentrant checkpointing turns gradients off
    inside the layers."""
    for buffer in training_buffers(model):
        buffer.watching = torch.is_grad_enabled()


def update_training_buffers(model: nn.Module) -> None:
    for buffer in training_buffers(model):
        if buffer.seen is not None:
            buffer.step()


def follow_optimizers(model: nn.Module, weights: frozenset[str]) -> None:
    """Update the training buffers of `model` after each step of an optimizer that trains any of `weights`, names of its
    parameters. The hook keeps no model alive, and goes with it."""
    followed = weakref.ref(model)

    def after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        model = followed()
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        trained = (name for name, weight in model.named_parameters() if weight.requires_grad and id(weight) in stepped)
        if not weights.isdisjoint(trained):
            update_training_buffers(model)

    if training_buffers(model):
        weakref.finalize(model, register_optimizer_step_post_hook(after_step).remove)
