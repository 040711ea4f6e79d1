"""Smaller models: few bits, fewer parts, a teacher's answers, and forms that run without PyTorch."""

import importlib

from hf_arch.compress.deploy import to_onnx, to_program
from hf_arch.compress.prune import prunable, prune
from hf_arch.compress.quantize import full_precision, quantization_config, quantize

LATER = {"DistillationTrainer": "distillation"}  # transformers' Trainer takes seconds to import


def __getattr__(name: str):
    if name not in LATER:
        raise AttributeError(f"module 'hf_arch.compress' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hf_arch.compress.{LATER[name]}"), name)


__all__ = [
    "DistillationTrainer",
    "full_precision",
    "prunable",
    "prune",
    "quantization_config",
    "quantize",
    "to_onnx",
    "to_program",
]
