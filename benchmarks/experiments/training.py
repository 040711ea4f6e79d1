"""One training loop for all tasks: fresh batches, AdamW, the loss where an answer is asked and nowhere else."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

IGNORED = -100
TOKENS_AT_ONCE = 2**15  # when measuring


class Batch(NamedTuple):
    input_ids: torch.Tensor  # [batch, length]
    labels: torch.Tensor  # [batch, length]: what a position has to answer, IGNORED where nothing is asked

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.input_ids.to(device), self.labels.to(device))


Make = Callable[..., Batch]  # make(generator, batch, **arguments)


@dataclass(frozen=True)
class Schedule:
    """AdamW without weight decay. The rate rises over the first twentieth, and then stays or falls along a cosine."""

    steps: int
    batch: int
    learning_rate: float
    cosine: bool = True
    solved: float = 0.01  # nats per answer, smoothed, at which training ends early

    def rate(self, step: int) -> float:
        warmup = min(1.0, (step + 1) / max(1, self.steps // 20))
        return self.learning_rate * warmup * (0.5 + 0.5 * math.cos(math.pi * step / self.steps) if self.cosine else 1)


@dataclass(frozen=True)
class Trained:
    steps: int  # fewer than scheduled if it was solved before
    loss: float  # nats per answer, smoothed over about 20 steps
    curve: list[tuple[int, float]]
    seconds: float  # of the processor; with a GPU, by the clock


def answers(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, labels) of the positions that are asked. No other logits are made."""
    hidden_states = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    asked = batch.labels != IGNORED
    return model.lm_head(hidden_states[asked]), batch.labels[asked]


def train(model: nn.Module, make: Make, arguments: dict, schedule: Schedule, seed: int = 0) -> Trained:
    """Train in place, in bfloat16 where that is fast."""
    device, generator = model.device, torch.Generator().manual_seed(seed)
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=fused)
    clock = time.process_time if device.type == "cpu" else time.perf_counter  # processors are often shared
    smooth, curve, started = None, [], clock()
    model.train()
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        batch = make(generator, schedule.batch, **arguments).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=fused):
            logits, labels = answers(model, batch)
        loss = cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = loss.detach() if smooth is None else smooth.lerp(loss.detach(), 0.05)
        if (step + 1) % max(1, schedule.steps // 20) == 0 or step + 1 == schedule.steps:
            curve.append((step + 1, smooth.item()))
        if step % 10 == 9 and smooth.item() < schedule.solved:
            break
    return Trained(step + 1, smooth.item(), curve, clock() - started)


@torch.no_grad()
def accuracy(model: nn.Module, make: Make, arguments: dict, examples: int, seed: int = 10**6) -> float:
    """Share of the answers that are right, on examples that training has not seen."""
    generator, right, asked, left = torch.Generator().manual_seed(seed), 0, 0, examples
    rows = max(1, TOKENS_AT_ONCE // make(generator, 1, **arguments).input_ids.shape[1])
    model.eval()
    while left > 0:
        logits, labels = answers(model, make(generator, min(rows, left), **arguments).to(model.device))
        right += (logits.argmax(-1) == labels).sum().item()
        asked += labels.numel()
        left -= rows
    return right / asked
