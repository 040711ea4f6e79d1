"""Models with fewer heads, channels, experts and layers: those that the loss would miss least go."""

from collections.abc import Iterable, Iterator

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel

from hf_arch.compress.sites import SITES, Site, Stack, stacks_of
from hf_arch.modeling.skeleton.config import ArchConfig
from hf_arch.remake.state import changed, refuse_adapters, remade

KINDS = (*SITES, "layers")
State = dict[str, torch.Tensor]


def prune(
    model: PreTrainedModel,
    *,
    heads: float = 0.0,
    channels: float = 0.0,
    experts: float = 0.0,
    layers: float = 0.0,
    batches: Iterable[dict] | None = None,
) -> PreTrainedModel:
    """A smaller model of the same class, without the least important parts of `model`, which stays as it is. Example:

        batches = [{"input_ids": ids, "labels": ids} for ids in some_text]
        small = hf_arch.compress.prune(model, heads=0.25, channels=0.5, layers=0.25, batches=batches)

    `heads`, `channels` (of feed-forwards, of experts too), `experts` and `layers` are the shares that go, of each layer
    alike, since a config has one number. Heads that share a key and value head go together, unless there is one alone;
    the width of a head stays. Experts go from each group alike, and no fewer stay than a token takes. The first layer
    stays. What is left is an ordinary model of a smaller config: it saves, loads, learns and takes LoRA; a few steps of
    training, or of distillation (`DistillationTrainer`), bring back most of what was lost.

    Importance is what the loss changes to first order where a part is taken away, |sum of w dL/dw| over the matrix by
    which it answers, summed over `batches`, which are called with labels (Michel et al., 2019, arXiv:1905.10650;
    Molchanov et al., 2019, arXiv:1906.10771); of a layer sum of |w dL/dw| over all its weights. Without batches it is
    the size of these weights.

    Raises ValueError for shares outside of 0 to 1, and for parts that the model does not have, or has in a form whose
    config has no such number; the error names those that can go, as does `prunable(model)`.
    """
    shares = {"heads": heads, "channels": channels, "experts": experts, "layers": layers}
    shares = {kind: share for kind, share in shares.items() if share}
    check(model, shares)
    try:
        fields, sites, stacks = planned(model, shares)
    except ValueError as error:
        raise ValueError(f"{error} {what_can(model)}") from error
    scores = importance(model, batches, sites, stacks)
    config, state = smaller(model, fields, sites, stacks, dict(model.state_dict()), scores)
    if wrong := mismatched(model, config, state):
        raise ValueError(
            f"{', '.join(shares)} of this {config.model_type} cannot go alike in all layers: no config has {wrong[0]} "
            f"as it would be. {what_can(model)}"
        )
    return remade(model, config, {name: tensor.clone() for name, tensor in state.items()})


def prunable(model: PreTrainedModel) -> list[str]:
    """Which of "heads", "channels", "experts" and "layers" `prune` can take from a model: those whose halves fit."""
    return [kind for kind in KINDS if can_go(model, kind)]


def can_go(model: PreTrainedModel, kind: str) -> bool:
    state = {name: tensor.detach().to("meta") for name, tensor in model.state_dict().items()}
    try:
        fields, sites, stacks = planned(model, {kind: 0.5})
        scores = [torch.zeros(part.units) for part in (*sites, *stacks)]
        return not mismatched(model, *smaller(model, fields, sites, stacks, state, scores))
    except (ValueError, StrictDataclassError):
        return False


def what_can(model: PreTrainedModel) -> str:
    return f"What can go is: {', '.join(prunable(model)) or 'nothing'}."


def check(model: PreTrainedModel, shares: dict[str, float]) -> None:
    if not isinstance(model.config, ArchConfig):
        raise ValueError(f"A {type(model).__name__} is not of hf_arch: convert it first, with hf_arch.convert.")
    if getattr(model, "is_quantized", False):
        raise ValueError("The model is quantised: prune it in full precision, then quantise what is left.")
    refuse_adapters(model)
    for kind, share in shares.items():
        if not 0 < share < 1:
            raise ValueError(f"{kind} is {share}; it is the share that goes, from 0 to below 1.")
    if not shares:
        raise ValueError("Nothing is to go: say heads, channels, experts or layers.")


def planned(model: PreTrainedModel, shares: dict[str, float]) -> tuple[dict, list[Site], list[Stack]]:
    """The fields of the smaller config, but for those of layers, and where parts go."""
    fields, sites = {}, []
    for kind in [kind for kind in SITES if kind in shares]:
        told, found = SITES[kind](model, shares[kind])
        fields, sites = fields | told, sites + found
    return fields, sites, stacks_of(model, shares["layers"]) if "layers" in shares else []


def importance(model: PreTrainedModel, batches: Iterable[dict] | None, sites: list, stacks: list) -> list[torch.Tensor]:
    """[units] of each site and each stack."""
    total = None
    for counted in weighed(model, batches):
        found = [part.scores(counted) for part in (*sites, *stacks)]
        total = found if total is None else [sum(pair) for pair in zip(total, found, strict=True)]
    if total is None:
        raise ValueError("batches are empty: importance needs some text.")
    return total


def weighed(model: PreTrainedModel, batches: Iterable[dict] | None) -> Iterator[State]:
    """What each weight counts for, batch by batch."""
    parameters = dict(model.named_parameters())
    if batches is None:
        yield {name: parameter.detach().abs() for name, parameter in parameters.items()}
        return
    training = model.training
    model.eval()
    try:
        for batch in batches:
            loss = model(**{name: value.to(model.device) for name, value in batch.items()}).loss
            if loss is None:
                raise ValueError("A batch without labels has no loss: batches are dicts with input_ids and labels.")
            gradients = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
            pairs = zip(parameters.items(), gradients, strict=True)
            yield {n: torch.zeros_like(p) if each is None else (p * each).detach() for (n, p), each in pairs}
    finally:
        model.train(training)


def smaller(
    model: PreTrainedModel, fields: dict, sites: list[Site], stacks: list[Stack], state: State, scores: list
) -> tuple[ArchConfig, State]:
    """The config and the state of what is left."""
    for part, score in zip((*sites, *stacks), scores, strict=True):
        kept = part.best(score)
        state = part.cut(state, kept)
        fields = fields | part.fields(kept)
    return changed(model.config, fields), state


def mismatched(model: nn.Module, config: ArchConfig, state: State) -> list[str]:
    """The names of tensors that a model of the config has otherwise."""
    with torch.device("meta"):
        empty = type(model)(config).state_dict()
    wanted = {name: tensor.shape for name, tensor in empty.items()}
    found = {name: tensor.shape for name, tensor in state.items()}
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
