"""Training with transformers' Trainer, and the measure of it: what a model makes of held-out text."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from hf_arch.demo.tokens import Figures, Stream

WINDOWS_AT_ONCE = 32  # when measuring
IGNORED = -100


@torch.no_grad()
def measure(model: nn.Module, stream: Stream, length: int) -> Figures:
    """The figures of a stream on which each token after the first counts once.

    Windows of `length` tokens overlap by half, and count what no earlier window did: past the first window, a token is
    predicted from at least half a window.
    """
    tokens = torch.from_numpy(stream.tokens)
    inputs, labels = (part.unfold(0, length, 1) for part in (tokens[:-1], tokens[1:]))
    last = len(inputs) - 1
    starts = torch.tensor([*range(0, last, length // 2), last])
    new = starts.diff(prepend=starts[:1] - length)[:, None]
    labels = labels[starts].where(torch.arange(length) >= length - new, IGNORED)

    was_training, nats = model.training, 0.0
    model.eval()
    for window, label in zip(inputs[starts].split(WINDOWS_AT_ONCE), labels.split(WINDOWS_AT_ONCE), strict=True):
        logits = model(input_ids=window.to(model.device)).logits.float().cpu()
        nats += cross_entropy(logits.flatten(0, 1), label.flatten(), ignore_index=IGNORED, reduction="sum").item()
    model.train(was_training)
    return stream.figures(nats / (len(tokens) - 1))


@dataclass(frozen=True)
class Point:
    """Of a learning curve."""

    step: int
    train_loss: float
    held_out: Figures


class Watch(TrainerCallback):
    """Moves the progress bar, and measures on held-out text whenever the Trainer logs its loss."""

    def __init__(self, measure: Callable[[nn.Module], Figures], advance: Callable[[], None]):
        self.measure, self.advance = measure, advance
        self.curve: list[Point] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.advance()

    def on_log(self, args, state, control, logs, model, **kwargs):
        if "loss" in logs:
            self.curve.append(Point(state.global_step, logs["loss"], self.measure(model)))


@dataclass(frozen=True)
class Schedule:
    steps: int
    learning_rate: float
    batch_size: int = 8
    points: int = 10  # of the learning curve


def train(model: nn.Module, windows: Dataset, schedule: Schedule, watch: Watch, folder: Path) -> list[Point]:
    """Train in place: AdamW, warmup, cosine. Answers the learning curve."""
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=schedule.steps,
            per_device_train_batch_size=schedule.batch_size,
            learning_rate=schedule.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=schedule.steps // 20,
            weight_decay=0.1,
            adam_beta2=0.95,
            logging_steps=max(schedule.steps // schedule.points, 1),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=0,
        ),
        train_dataset=windows,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return watch.curve
