"""What the steps of the demo share: how much to do, what to work with, and what was found."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_arch import Architecture
from hf_arch.demo.screen import Screen
from hf_arch.demo.tokens import Figures, TokenizedCorpus, Windows
from hf_arch.demo.training import Point, Schedule, Watch, measure, train

TOLERANCE = 1e-4  # of logits that should be equal: float32 summed in another order differs by less


@dataclass(frozen=True)
class Scale:
    """How much the demo does. The defaults take about four minutes on two CPU cores."""

    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    dropout: float = 0.2
    length: int = 128  # of the windows of text, in tokens
    base: Schedule = Schedule(steps=800, learning_rate=3e-3)
    adapter: Schedule = Schedule(steps=240, learning_rate=2e-3)
    rank: int = 16
    new_tokens: int = 80


@dataclass(frozen=True)
class Stage:
    """A row of the final table."""

    name: str
    figures: list[Figures]  # of each text, on its held-out part
    parameters: int | None = None  # that were trained
    size: int | None = None  # of the weights on disk, in bytes
    seconds: float | None = None


@dataclass
class Job:
    row: Architecture
    scale: Scale
    folder: Path
    screen: Screen
    tokenizer: PreTrainedTokenizerBase
    texts: tuple[TokenizedCorpus, TokenizedCorpus]  # the base learns the first, the adapter the second
    stages: list[Stage] = field(default_factory=list)
    logits: dict[str, torch.Tensor] = field(default_factory=dict)  # of each saved model on its probe

    def new_model(self) -> PreTrainedModel:
        scale, end = self.scale, self.tokenizer.eos_token_id
        config = self.row.load("Config")(
            vocab_size=scale.vocab_size,
            hidden_size=scale.hidden_size,
            intermediate_size=scale.intermediate_size,
            num_hidden_layers=scale.num_hidden_layers,
            num_attention_heads=scale.num_attention_heads,
            max_position_embeddings=scale.length,
            hidden_dropout=scale.dropout,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=self.tokenizer.pad_token_id,
            **self.row.head_fields.get("ForCausalLM", {}),
        )
        torch.manual_seed(0)
        return self.row.load("ForCausalLM")(config)

    def learn(self, model: nn.Module, text: TokenizedCorpus, schedule: Schedule, title: str) -> list[Point]:
        """Train `model` in place; afterwards it is on the CPU, and in eval."""
        bar = self.screen.bar(title, schedule.steps)
        watch = Watch(lambda model: measure(model, text.held_out, self.scale.length), bar)
        train(model, Windows(text.train, self.scale.length), schedule, watch, self.folder)
        model.cpu().eval()
        return watch.curve

    def measure(self, model: nn.Module) -> list[Figures]:
        return [measure(model, text.held_out, self.scale.length) for text in self.texts]

    def probe(self, text: TokenizedCorpus) -> list[int]:
        """The tokens on which a model that is loaded again has to agree with the one that was saved."""
        return text.held_out.tokens[: self.scale.length].tolist()

    @torch.no_grad()
    def finish(self, name: str, model: nn.Module, text: TokenizedCorpus, weights: Path, started: float) -> None:
        """Note what there is to say of a model that was saved."""
        self.logits[name] = model(input_ids=torch.tensor([self.probe(text)])).logits
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        stage = Stage(name, self.measure(model), trained, weights.stat().st_size, time.perf_counter() - started)
        self.stages.append(stage)
        self.screen.say(f"{name}: saved in {weights.parent}")

    def check(self, what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        difference = (found - expected).abs().max().item()
        if not difference < TOLERANCE:  # so that nan fails, too
            raise RuntimeError(
                f"{what}: logits differ by {difference:.2g}. This is a fault of hf_arch; please report it."
            )
        self.screen.say(f"{what}: the same logits (they differ by {difference:.1g} at most)")
