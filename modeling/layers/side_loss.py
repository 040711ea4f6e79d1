"""Losses that layers make beside their answer, of parameters that the answer does not train."""

import torch


class SideLoss:
    """Collects a number from each layer, and lets its gradient in again where the layer took it from.

    Nothing but the answer of a layer carries gradients through reentrant checkpointing and the hooks of sharded
    modules. So the layer adds to its answer what `attach` gives it: a zero, through which the gradient of the whole
    loss comes back, however that was scaled. Compiled, there are no such hooks, and gradients go their usual way. One
    object is for one call of a model. `by_document` tells layers to add up a mean over each document, for losses that
    count texts: in pieces of a batch they then add up.
    """

    def __init__(self, by_document: bool = False):
        self.by_document = by_document
        self.values: dict[int, torch.Tensor] = {}
        self.counts: dict[int, torch.Tensor] = {}
        self.gradient: torch.Tensor | None = None  # of the whole loss by what `total` sums up

    def attach(self, layer_idx: int, loss: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """`loss`: a sum over `count` tokens, or documents."""
        compiling = torch.compiler.is_compiling()  # which would take the gradient that there is now for that of always
        self.values[layer_idx], self.counts[layer_idx] = loss if compiling else loss.detach(), count
        if loss.requires_grad and not compiling:
            loss.register_hook(self.gradient_of)
        return 0.0 * loss

    def gradient_of(self, gradient: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(gradient) if self.gradient is None else self.gradient.to(gradient.dtype)

    def total(self) -> torch.Tensor:
        """The sum over all that is counted, and layers."""
        return sum(self.values.values(), torch.zeros(()))

    def mean(self) -> torch.Tensor:
        """The mean over what is counted, added up over the layers."""
        return sum((self.values[i].detach() / self.counts[i].clamp(min=1) for i in self.values), torch.zeros(()))

    def join(self, loss: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
        """loss + weight * total, in the type of the loss."""
        whole = loss + (weight * self.total()).to(loss)
        if whole.requires_grad and not torch.compiler.is_compiling():
            whole.register_hook(lambda gradient: setattr(self, "gradient", gradient * weight))
        return whole


class LateLoss:
    """The same of what layers say before it is known what they should have said: `said` of each, for a loss to be made
    of, whose gradient is let in again where the layer took it from."""

    def __init__(self):
        self.said: dict[int, torch.Tensor] = {}
        self.gradients: dict[int, torch.Tensor] = {}  # of the whole loss by what was said

    def attach(self, layer_idx: int, said: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            self.said[layer_idx] = said
            return (0.0 * said).sum()
        self.said.setdefault(layer_idx, said.detach().requires_grad_())  # not again when backward computes anew
        if said.requires_grad:
            said.register_hook(lambda gradient: self.gradients.get(layer_idx, torch.zeros_like(gradient)))
        return (0.0 * said).sum()

    def join(self, loss: torch.Tensor, late: torch.Tensor) -> torch.Tensor:
        """loss + late, which is made of `said`, in the type of the loss."""
        if torch.compiler.is_compiling():
            return loss + late.to(loss)
        whole = loss + late.detach().to(loss)
        if whole.requires_grad and self.said:
            found = dict(zip(self.said, torch.autograd.grad(late, list(self.said.values())), strict=True))
            whole.register_hook(lambda gradient: self.gradients.update((i, x * gradient) for i, x in found.items()))
        return whole
