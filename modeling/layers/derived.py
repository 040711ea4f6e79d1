"""What is computed from parameters alone, such as the matrices of a state space: again at each call while they train,
once for all calls in evaluation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..ops.precision import without_autocast

ADAPTERS = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")  # what PEFT turns beside parameters


def adapters_of(module: nn.Module) -> tuple[str, ...]:
    """What changes when an adapter within the module is turned on or off."""
    return tuple(repr(getattr(part, name, None)) for part in module.modules() for name in ADAPTERS)


class Derived(nn.Module):
    """A module that keeps what it made of its parameters until one of them, or an adapter, changes.

    Nothing is kept where gradients are recorded, while a model is compiled, or where an adapter stands in for a
    parameter. A change by way of `parameter.data` shows only to the next `train()` or `eval()`, both of which forget
    what was kept.
    """

    def __init__(self):
        super().__init__()
        self.made: dict[str, tuple[tuple, Any]] = {}

    def keeps_nothing(self) -> bool:
        return self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()

    def derive(self, name: str, make: Callable[[], Any]) -> Any:
        """make(), without autocast, or what it answered last time."""
        parameters = list(self.parameters())
        with without_autocast(parameters[0]):
            if self.keeps_nothing():
                return make()
            if is_parametrized(self) or any(parameter.is_inference() for parameter in parameters):
                return make()  # their changes cannot be counted
            state = tuple((parameter.data_ptr(), parameter._version, parameter.dtype) for parameter in parameters)
            state += adapters_of(self)
            if name not in self.made or self.made[name][0] != state:
                with torch.inference_mode(False), torch.no_grad():  # the parameters too: no other takes their place
                    self.made[name] = state, make(), parameters
        return self.made[name][1]

    def train(self, mode: bool = True):
        self.made.clear()
        return super().train(mode)

    def _apply(self, *args, **kwargs):
        self.made.clear()
        return super()._apply(*args, **kwargs)
