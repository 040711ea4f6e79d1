"""Transformer-XL answers as transformers' last version of it did, and has the properties that its paper derives.

The golden answers are of `TransfoXLLMHeadModel` in float64, read segment by segment
(`goldens/make_transformer_xl_original.py`).
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_arch.convert import convert

GOLDEN = Path(__file__).parent / "goldens" / "transformer_xl_original.safetensors"
MODELS = ("segments", "same_length", "pre_norm", "adaptive", "adaptive_even", "projected")


def checkpoint(folder, model, **more):
    """The golden's model in transformers' layout, and its answers."""
    with safe_open(GOLDEN, "pt") as file:
        fields = json.loads(file.metadata()["configs"])[model]
    told = {"model_type": "transfo-xl", "architectures": ["TransfoXLLMHeadModel"]}
    (folder / "config.json").write_text(json.dumps(fields | told | more))
    tensors = {key.removeprefix(f"{model}."): x for key, x in load_file(GOLDEN).items() if key.startswith(f"{model}.")}
    weights = {key.removeprefix("weights."): x for key, x in tensors.items() if key.startswith("weights.")}
    save_file(weights, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_equals_transformers(model, tmp_path):
    expected = checkpoint(tmp_path, model)
    ours = convert(tmp_path, "transformer_xl").double()
    logits = ours(expected["ids"]).logits
    last = [*range(7, 52, 8), 51]  # of each segment
    assert (logits.log_softmax(-1)[:, last] - expected["logits"]).abs().max() < 1e-8
    first = expected["ids"][:, :8]
    loss = ours(first, labels=first).loss  # in float32, as in all of transformers
    assert loss.item() == pytest.approx(expected["loss"].item(), rel=1e-6)
