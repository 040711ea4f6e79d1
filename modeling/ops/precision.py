"""Arithmetic that autocast does not narrow."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(like: torch.Tensor) -> AbstractContextManager:
    """Switches autocast off where `like` is. Nothing is done where it is off: a step in decoding does little else."""
    device = like.device.type
    known = device != "meta"  # where nothing is computed
    return torch.autocast(device, enabled=False) if known and torch.is_autocast_enabled(device) else nullcontext()
