"""Small models of the Transformer laboratory for its tests."""

import torch

from hf_arch import find

ROW = find("transformer")
BIAS_FREE = {"position_type": "none"}


def build(head="Model", **fields):
    """A small model in float64, its weights far from small."""
    torch.manual_seed(0)
    model = ROW.load(head)(ROW.tiny_config(head, **({"initializer_range": 0.25} | fields))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double()
