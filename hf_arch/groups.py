"""Which parameters an optimizer treats alike."""

from torch import nn

STATE_LR = 1e-3  # at most, as the authors of S4 train: a state space that turns faster than it fades forgets its memory


def parameter_groups(
    model: nn.Module, lr: float, *, weight_decay: float = 0.0, state_lr: float | None = None
) -> list[dict]:
    """Groups for any optimizer of torch: matrices, which decay; vectors, such as norms and biases, which do not; and
    what sets the memory of state spaces (decays, step sizes), which has a learning rate of its own, by default `lr` or
    0.001 where that is less, and does not decay.

    For a Trainer: `optimizer = torch.optim.AdamW(hf_arch.parameter_groups(model, lr=4e-3, weight_decay=0.05))`, then
    `Trainer(..., optimizers=(optimizer, None))`; its schedule scales all groups. A module of ours names these
    parameters in `state_parameters`. Parameters that are frozen are left out, and groups without any.
    """
    of_states = {
        id(module.get_parameter(name)) for module in model.modules() for name in getattr(module, "state_parameters", ())
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    states = [parameter for parameter in trained if id(parameter) in of_states]
    others = [parameter for parameter in trained if id(parameter) not in of_states]
    groups = [
        {"params": [each for each in others if each.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [each for each in others if each.ndim < 2], "lr": lr, "weight_decay": 0.0},
        {"params": states, "lr": min(lr, STATE_LR) if state_lr is None else state_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
