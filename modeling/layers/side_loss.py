"""A loss that layers make beside their answer, of parameters that the answer does not train."""

import torch


class SideLoss:
    """Collects a number from each layer, and lets its gradient in again where the layer took it from.

    Nothing but the answer of a layer carries gradients through reentrant checkpointing and the hooks of sharded
    modules. So the layer adds to its answer what `attach` gives it: a zero, through which the gradient of the whole
    loss comes back, however that was scaled. One object is for one call of a model.
    """

    def __init__(self):
        self.values: dict[int, torch.Tensor] = {}
        self.gradient: torch.Tensor | None = None  # of the whole loss by the sum of the values

    def attach(self, layer_idx: int, loss: torch.Tensor) -> torch.Tensor:
        self.values[layer_idx] = loss.detach()
        if loss.requires_grad:
            loss.register_hook(self.gradient_of)
        return 0.0 * loss

    def gradient_of(self, gradient: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(gradient) if self.gradient is None else self.gradient.to(gradient.dtype)

    def total(self) -> torch.Tensor:
        return sum(self.values.values())

    def join(self, loss: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
        """loss + weight * the sum of the values."""
        whole = loss + weight * self.total().to(loss.device)
        if whole.requires_grad:
            whole.register_hook(lambda gradient: setattr(self, "gradient", gradient * weight))
        return whole
