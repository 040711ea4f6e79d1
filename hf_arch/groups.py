"""Which parameters an optimizer treats alike."""

from collections.abc import Sequence

from torch import nn

from hf_arch.modeling.skeleton.hierarchy import Hierarchy

STATE_LR = 1e-3  # at most, as the authors of S4 train: a state space that turns faster than it fades forgets its memory


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    state_lr: float | None = None,
    level_factors: Sequence[float] | None = None,
) -> list[dict]:
    """Groups for any optimizer of torch: matrices, which decay; vectors, such as norms and biases, which do not; and
    what sets the memory of state spaces (decays, step sizes), which has a learning rate of its own, by default `lr` or
    0.001 where that is less, and does not decay.

    level_factors: what the rates of each level of a hierarchy (Hourglass, MegaByte, H-Net) are multiplied by, from that
    of tokens up; each level then has such groups of its own. H-Net's authors train outer levels, which are narrow and
    see many items, at larger rates (Hwang et al., 2025, arXiv:2507.07955). ValueError where the model has no such
    levels, or not so many.

    For a Trainer: `optimizer = torch.optim.AdamW(hf_arch.parameter_groups(model, lr=4e-3, weight_decay=0.05))`, then
    `Trainer(..., optimizers=(optimizer, None))`; its schedule scales all groups. A module of ours names these
    parameters in `state_parameters`. Parameters that are frozen are left out, and groups without any.
    """
    of_states = {
        id(module.get_parameter(name)) for module in model.modules() for name in getattr(module, "state_parameters", ())
    }
    slowest = min(lr, STATE_LR) if state_lr is None else state_lr
    groups = []
    for factor, level in by_level(model, level_factors):
        trained = [parameter for parameter in level if parameter.requires_grad]
        states = [parameter for parameter in trained if id(parameter) in of_states]
        others = [parameter for parameter in trained if id(parameter) not in of_states]
        matrices, vectors = [each for each in others if each.ndim > 1], [each for each in others if each.ndim < 2]
        groups += [
            {"params": matrices, "lr": factor * lr, "weight_decay": weight_decay},
            {"params": vectors, "lr": factor * lr, "weight_decay": 0.0},
            {"params": states, "lr": factor * slowest, "weight_decay": 0.0},
        ]
    return [group for group in groups if group["params"]]


def by_level(model: nn.Module, factors: Sequence[float] | None) -> list[tuple[float, list[nn.Parameter]]]:
    """The parameters of each level, with its factor; of the first one also what is of none. One that levels share is of
    the lowest of them."""
    if factors is None:
        return [(1.0, list(model.parameters()))]
    found = [module for module in model.modules() if isinstance(module, Hierarchy)]
    if not found or found[0].config.num_levels != len(factors):
        levels = found[0].config.num_levels if found else "no"
        raise ValueError(f"There are {len(factors)} level_factors, but the model has {levels} levels.")
    level_of = {}
    for level in range(len(factors)):
        for parameter in found[0].parameters_of(level):
            level_of.setdefault(id(parameter), level)
    return [
        (factor, [each for each in model.parameters() if level_of.get(id(each), 0) == level])
        for level, factor in enumerate(factors)
    ]
