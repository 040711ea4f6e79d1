"""Smaller models: few bits, fewer parts, a teacher's answers, and forms that run without PyTorch."""

from hf_arch.compress.prune import prunable, prune
from hf_arch.compress.quantize import full_precision, quantization_config, quantize

__all__ = ["full_precision", "prunable", "prune", "quantization_config", "quantize"]
