"""What the checkpoints of RWKV have in common."""

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from ..skeleton.conversion import Fields, Tensors


def authors_model(folder: Path, fields: Fields, tensors: Tensors, head: str) -> Callable:
    """The authors' own package, which reads one text at a time."""
    try:
        package = importlib.import_module("rwkv.model")
    except ImportError as error:
        raise ImportError(f"Comparing with the original needs the package rwkv: pip install rwkv ({error}).") from error
    if head != "ForCausalLM":
        raise ValueError("The original answers with logits: compare them, with head='ForCausalLM'.")
    with tempfile.TemporaryDirectory() as written:
        torch.save(tensors, Path(written, "model.pth"))
        model = package.RWKV(str(Path(written, "model")), "cpu fp32")
    return lambda ids: torch.stack([model.forward(text.tolist(), None, full_output=True)[0] for text in ids])
