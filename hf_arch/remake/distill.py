"""Long filters as small recurrences (Massaroli et al., 2023, arXiv:2310.18780): steps that cost the same after any
text, and a state of fixed size."""

import copy
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_arch.modeling.layers.implicit_filter import ImplicitFilter

POINTS = 512  # of a filter, from which its waves are found
TAPS = 4096  # of a filter, at which they are fitted and compared with it
CHANNELS = 16  # that are fitted at once
SLOWEST = 1e-9  # rate of fading per token


class Distilled(NamedTuple):
    model: PreTrainedModel
    errors: dict[str, torch.Tensor]  # by the name of a filter: of each channel, |fitted - filter| / |filter|


@torch.no_grad()
def distill(model: PreTrainedModel, state_size: int = 16) -> Distilled:
    """A model whose filters are sums of `state_size` fading waves each, as near as they come to those of `model`, and
    how near that is. Example:

        distilled, errors = hf_arch.distill(model, state_size=16)
        print(max(error.max() for error in errors.values()))
        distilled.save_pretrained("flat")

    `model` stays as it is; the new one is an ordinary model of its class, in eval, whose layers of type "hyena" are of
    type "modal_hyena". Raises ValueError for a model without such layers, or with adapters in them.
    """
    filters = {name: module for name, module in model.named_modules() if isinstance(module, ImplicitFilter)}
    if not filters:
        raise ValueError(f"A {type(model).__name__} has no implicit filters that could be distilled.")
    if any("lora_" in name for each in filters.values() for name, _ in each.named_parameters()):
        raise ValueError("An adapter is part of the filters: merge it first, with merge_and_unload().")
    config = copy.deepcopy(model.config)
    config.layer_types = ["modal_hyena" if kind == "hyena" else kind for kind in config.layer_types]
    config.state_size = state_size
    distilled = type(model)(config).to(device=model.device, dtype=model.dtype).eval()
    distilled.generation_config = copy.deepcopy(model.generation_config)
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(tuple(filters))}
    distilled.load_state_dict(kept, strict=False)
    errors = {}
    for name, implicit in filters.items():
        kernel = torch.cat(copy.deepcopy(implicit).double().cpu().kernels(implicit.longest))
        fitted = zip(*(fit(part, state_size) for part in kernel.split(CHANNELS)), strict=True)
        *values, errors[name] = (torch.cat(parts) for parts in fitted)
        modal = distilled.get_submodule(name)
        for parameter, value in zip((modal.rate_log, modal.turn, modal.readout, modal.skip), values, strict=True):
            parameter.copy_(value)
    return Distilled(distilled, errors)


def fit(kernel: torch.Tensor, states: int) -> tuple[torch.Tensor, ...]:
    """kernel [channels, taps] in float64 -> the parameters of a `ModalFilter`, and the error of each channel. Fewer
    waves are tried as well: those of a smooth filter may be too like each other to be told apart."""
    tried = [fit_waves(kernel, count, states) for count in sorted({states, -(-states // 2), -(-states // 4)})]
    best = torch.stack([error for *_, error in tried]).argmin(dim=0), torch.arange(len(kernel), device=kernel.device)
    return tuple(torch.stack(values)[best] for values in zip(*tried, strict=True))


def fit_waves(kernel: torch.Tensor, count: int, states: int) -> tuple[torch.Tensor, ...]:
    """The same with `count` waves, and others that are nothing."""
    later, channels = kernel[:, 1:], len(kernel)
    exponents = wave_exponents(later, count) if later.shape[1] > 1 else later.new_full((channels, count), -1.0) + 0j
    places = torch.linspace(0, later.shape[1] - 1, min(TAPS, later.shape[1])).round().long().unique()
    taps, places = later[:, places], (places + 1).to(kernel)
    weights = least_squares(exponents, places, taps)
    # A wave that does not turn counts once, a turning one is half a pair: too many are found, and the loudest stay
    energy = weights.abs().square() * torch.exp(2 * exponents.real[..., None] * places).sum(-1)
    loudest = energy.topk(min(count, energy.shape[1]), dim=1).indices
    exponents = exponents.gather(1, loudest)
    weights = least_squares(exponents, places, taps)
    found = (weights[..., None] * torch.exp(exponents[..., None] * places)).real.sum(1)
    skip = kernel[:, 0] - weights.real.sum(1)
    error = (found - taps).norm(dim=1) / torch.cat((taps, kernel[:, :1]), dim=1).norm(dim=1).clamp(min=1e-30)
    missing = (0, states - exponents.shape[1])
    exponents, weights = nn.functional.pad(exponents, missing, value=-1.0), nn.functional.pad(weights, missing)
    readout = torch.view_as_real(weights.conj().resolve_conj())
    return (-exponents.real).clamp(min=SLOWEST).log(), exponents.imag, readout, skip, error


def wave_exponents(kernel: torch.Tensor, count: int) -> torch.Tensor:
    """[channels, 2 * count or less] complex: the exponents per token of the waves that make up a kernel, by the
    eigensystem realisation of its Hankel matrix (Kung, 1978): all of waves that do not turn, and one of each pair."""
    stride = -(-kernel.shape[1] // POINTS)
    means = kernel[:, : kernel.shape[1] // stride * stride].unflatten(1, (-1, stride)).mean(-1)
    hankel = means.unfold(1, means.shape[1] - means.shape[1] // 2, 1)
    left, sizes, right = torch.linalg.svd(hankel[:, :-1], full_matrices=False)
    rank = min(2 * count, sizes.shape[1])
    scale = sizes[:, :rank].clamp(min=1e-12 * sizes.max()).rsqrt()
    moved = scale[..., None] * (left[..., :rank].mT @ hankel[:, 1:] @ right[:, :rank].mT) * scale[:, None]
    exponents = torch.linalg.eigvals(moved).log() / stride
    exponents = torch.complex(exponents.real.clamp(min=-50.0, max=-SLOWEST), exponents.imag)
    # The other of a pair would be the same wave again: it fades at once instead
    return torch.where(exponents.imag < -1e-12, torch.full_like(exponents, -50.0), exponents)


def least_squares(exponents: torch.Tensor, places: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """[channels, waves] complex: the weights with which Re sum weight exp(exponent place) is nearest to the taps."""
    waves = torch.exp(exponents[..., None] * places)
    columns = torch.cat((waves.real, -waves.imag), dim=1).mT
    real, imaginary = torch.linalg.lstsq(columns, taps[..., None], driver="gelsd").solution[..., 0].chunk(2, dim=-1)
    return torch.complex(real, imaginary)
