"""What routers do: how busy each expert is, which tokens found no room, how sure the choice was."""

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.modeling_outputs import ModelOutput

from hf_arch.modeling.layers.record import RouterLogits
from hf_arch.modeling.layers.sparse import MixtureOfExperts


@dataclass(frozen=True)
class RoutingStatistics:
    """Of the sparse feed-forwards of a model, in their order, over real tokens.

    load [layers, experts]: the share of an expert in what all serve; 1 / experts each where they are equally busy.
    dropped [layers]: the share of choices that found their expert full; where experts choose, a token that none took
    counts as one such.
    entropy [layers]: of the probabilities that a token gives the experts, on average, in nats: log(experts) where it
    does not care, 0 where it is sure.
    """

    load: torch.Tensor
    dropped: torch.Tensor
    entropy: torch.Tensor


def routing_statistics(outputs: ModelOutput) -> RoutingStatistics:
    """What the routers of a model did, from its answer to a call with `output_router_logits=True`. Of an
    encoder-decoder, the encoder's layers come first. Raises ValueError where the answer tells nothing of routers.

    Example: `hf_arch.routing_statistics(model(**batch, output_router_logits=True)).load`.
    """
    stacks = [stack for stack in ("", "encoder_", "decoder_") if outputs.get(f"{stack}router_choices")]
    if not stacks:
        raise ValueError(
            "The answer holds no router_choices: call a model that has experts with output_router_logits=True."
        )
    logits, choices = (
        [layer for stack in stacks for layer in outputs[f"{stack}router_{name}"]] for name in ("logits", "choices")
    )
    return from_counts([count(*told) for told in zip(logits, choices, strict=True)])


def count(logits: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
    """[experts + 3] of a layer: how often each expert was chosen, how often one that was full, the sum of entropies,
    and the number of real tokens; so that calls and processes add up.

    logits [tokens, experts]; choices [tokens, choices], as `RouterChoices` tells them.
    """
    experts, real = logits.shape[-1], choices[:, 0] >= 0
    wide = torch.promote_types(logits.dtype, torch.float32)
    chosen = torch.zeros(experts + 1, dtype=wide, device=logits.device)
    made = choices[choices >= 0]
    chosen.index_add_(0, made, torch.ones_like(made, dtype=wide))
    unsure = torch.special.entr(logits[real].softmax(-1, dtype=wide)).sum()
    return torch.cat((chosen, torch.stack((unsure, real.sum().to(wide)))))


def from_counts(counts: Sequence[torch.Tensor]) -> RoutingStatistics:
    table = torch.stack(list(counts)).float()
    chosen, tokens = table[:, :-2], table[:, -1].clamp(min=1)
    served = chosen[:, :-1].sum(1, keepdim=True).clamp(min=1)
    dropped = chosen[:, -1] / chosen.sum(1).clamp(min=1)
    return RoutingStatistics(chosen[:, :-1] / served, dropped, table[:, -2] / tokens)


class RoutingCallback(TrainerCallback):
    """Tells a Trainer's log what routers did in training since the last entry, and draws it at the end.

    Each entry gets, for each sparse layer, `routing/<layer>/busiest` (the share of its busiest expert, times the number
    of experts: 1 where all are equally busy), `.../dropped` and `.../entropy`; see `RoutingStatistics`. `history` holds
    all of it. Works on the model as it trains: distributed, with checkpointing, with adapters.

    plot: where to draw the load of each expert, a picture (`.png`) of all sparse layers over the steps; it takes
        `pip install hf-arch[plots]`.
    Example: `Trainer(..., callbacks=[hf_arch.RoutingCallback(plot="routing.png")])`.
    """

    def __init__(self, plot: str | os.PathLike | None = None):
        self.plot = None if plot is None else Path(plot)
        if plot is not None:  # not at the top, and not after training either: matplotlib is an extra
            self.draw = importlib.import_module("hf_arch.routing_picture").draw
        self.history: list[tuple[int, RoutingStatistics]] = []
        self.counts: list[torch.Tensor] = []
        self.names: list[str] = []
        self.handles: list = []

    def on_train_begin(self, args, state, control, model: PreTrainedModel, **kwargs) -> None:
        layers = {name: module for name, module in model.named_modules() if isinstance(module, MixtureOfExperts)}
        watched = {name: module for name, module in layers.items() if records(module)}
        if not watched:
            raise ValueError("RoutingCallback watches routers, but no feed-forward of this model has one.")
        self.names, self.counts = [short(name) for name in watched], [torch.zeros(())] * len(watched)
        for layer, module in enumerate(watched.values()):
            self.handles += watch(module, self.adding_to(layer))

    def adding_to(self, layer: int) -> Callable[[torch.Tensor], None]:
        def add(found: torch.Tensor) -> None:
            self.counts[layer] = self.counts[layer].to(found) + found

        return add

    def on_log(self, args, state, control, logs: dict | None = None, **kwargs) -> None:
        if not self.counts or not all(counted.ndim for counted in self.counts):
            return  # nothing was routed since the last entry
        if dist.is_available() and dist.is_initialized():
            for counted in self.counts:
                dist.all_reduce(counted)
        found = from_counts([counted.cpu() for counted in self.counts])
        self.counts = [torch.zeros(())] * len(self.counts)
        self.history.append((state.global_step, found))
        entry = {}
        for layer, name in enumerate(self.names):
            entry[f"routing/{name}/busiest"] = float(found.load[layer].max()) * found.load.shape[1]
            entry[f"routing/{name}/dropped"] = float(found.dropped[layer])
            entry[f"routing/{name}/entropy"] = float(found.entropy[layer])
        for told in (logs, *state.log_history[-1:]):
            told.update(entry)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if self.plot is not None and self.history and state.is_world_process_zero:
            steps, found = zip(*self.history, strict=True)
            load, dropped = (torch.stack([getattr(each, name) for each in found]) for name in ("load", "dropped"))
            self.draw(self.names, steps, load, dropped, self.plot)


def records(module: MixtureOfExperts) -> bool:
    """Whether there is a choice, and it is told."""
    return any(isinstance(part, RouterLogits) for part in module.modules())


def watch(module: MixtureOfExperts, add: Callable[[torch.Tensor], None]) -> list:
    """Call `add` with the `count` of each call of a sparse feed-forward in training; answers the hooks' handles."""
    last: list[torch.Tensor] = []

    def see_logits(part: nn.Module, told: tuple, logits: torch.Tensor) -> None:
        last[:] = [logits.detach()]

    def see_choices(part: nn.Module, told: tuple, choices: torch.Tensor) -> None:
        if module.training:
            add(count(last.pop(), choices))

    routers = [part for part in module.modules() if isinstance(part, RouterLogits)]
    return [
        *(part.register_forward_hook(see_logits) for part in routers),
        module.choices.register_forward_hook(see_choices),
    ]


def short(name: str) -> str:
    """`model.layers.3.feed_forward` -> `3`; an encoder's `encoder.3`."""
    parts = name.split(".")
    layer = parts[parts.index("layers") + 1]
    return ".".join([*(part for part in parts if part in ("encoder", "decoder")), layer])
