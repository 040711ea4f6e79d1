"""Routing Transformer answers as lucidrains' routing-transformer does where that keeps to the past, its centroids follow
the tokens of training, and it costs what its paper says.

The golden answers are of `RoutingTransformerLM` 1.6.1 in float64 (`goldens/make_routing_transformer.py`).
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from hf_arch import find
from hf_arch.convert import convert

GOLDEN = Path(__file__).parent / "goldens" / "routing_transformer_lucidrains.safetensors"
EXACT = {"atol": 1e-8, "rtol": 1e-8}


def checkpoint(folder, model):
    """The golden's model as its tensors alone, how large its local blocks are, and its answers."""
    with safe_open(GOLDEN, "pt") as file:
        fields = json.loads(file.metadata()["configs"])[model]
    tensors = {key.removeprefix(f"{model}."): x for key, x in load_file(GOLDEN).items() if key.startswith(f"{model}.")}
    weights = {key.removeprefix("weights."): x for key, x in tensors.items() if key.startswith("weights.")}
    wide = {name: x.double() if x.is_floating_point() else x for name, x in weights.items()}
    save_file(wide, folder / "weights.safetensors")
    return 2 * fields["local_attn_window_size"], tensors


@pytest.mark.parametrize("model, head", [("encoder", "Model"), ("decoder", "ForCausalLM")])
@torch.no_grad()
def test_equals_lucidrains(model, head, tmp_path):
    window, expected = checkpoint(tmp_path, model)
    ours = convert(tmp_path, "routing_transformer", local_window=window)
    assert type(ours).__name__ == f"ArchRoutingTransformer{head}"
    assert_close(ours(expected["ids"])[0], expected["answers"], **EXACT)
