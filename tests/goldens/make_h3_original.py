"""Write h3_original.safetensors: weights of small language models of H3 layers, and what they answer in float64.

    python tests/goldens/make_h3_original.py --peer CHECKOUT_OF_H3

The peer is github.com/HazyResearch/H3, and wants einops and opt_einsum. Its layers are used as they are; its stack, its
attention and its feed-forwards come from flash_attn, which wants a GPU: the same is spelled out here.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

SIZE, INNER, STATES, VOCABULARY, LAYERS, HEADS, LENGTH = 8, 12, 6, 23, 3, 2, 90
MODELS = {
    "hybrid": {"attends": [1], "head_dim": 1},
    "heads": {"attends": [], "head_dim": 2},
}
ABSENT = ("pytorch_lightning", "pytorch_lightning.utilities")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.Wqkv, self.out_proj = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x):
        split = self.Wqkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(*split, is_causal=True).transpose(1, 2).flatten(-2))


class Feed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(SIZE, INNER), nn.Linear(INNER, SIZE)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Layer(nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.mixer, self.mlp, self.norm1, self.norm2 = mixer, Feed(), nn.LayerNorm(SIZE), nn.LayerNorm(SIZE)

    def forward(self, x, residual):
        residual = x + residual
        residual = self.mixer(self.norm1(residual)) + residual
        return self.mlp(self.norm2(residual)), residual


@torch.no_grad()
def answers(attends: list[int], head_dim: int, seed: int) -> dict[str, torch.Tensor]:
    h3 = importlib.import_module("src.models.ssm.h3").H3
    torch.manual_seed(seed)
    told = {"d_state": STATES, "head_dim": head_dim, "mode": "diag", "measure": "diag-lin"}
    layers = [Layer(Attention() if n in attends else h3(SIZE, **told)) for n in range(LAYERS)]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers), "ln_f": nn.LayerNorm(SIZE)})
    embeddings = nn.Embedding(VOCABULARY, SIZE)
    for name, parameter in [*model.named_parameters(), *embeddings.named_parameters()]:
        parameter.add_(0.3 * torch.randn(parameter.shape))
        if parameter.ndim == 2 and "kernel" not in name:
            parameter.mul_(2)
    state = {f"backbone.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    state["backbone.embeddings.word_embeddings.weight"] = embeddings.weight.clone()
    state["lm_head.weight"] = embeddings.weight.clone()
    model.double(), embeddings.double()
    ids = torch.randint(VOCABULARY, (1, LENGTH))
    x, residual = embeddings(ids), 0
    for layer in layers:
        x, residual = layer(x, residual)
    logits = model["ln_f"](x + residual) @ embeddings.weight.T
    return {f"weights.{name}": tensor for name, tensor in state.items()} | {"ids": ids, "logits": logits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="a checkout of github.com/HazyResearch/H3")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("h3_original.safetensors"))
    options = parser.parse_args()
    sys.path.insert(0, options.peer)
    sys.modules |= {name: MagicMock() for name in ABSENT}
    torch.Tensor.float = lambda tensor: tensor  # it narrows its filters, in a float64 model too
    golden = {name: answers(**fields, seed=seed) for seed, (name, fields) in enumerate(MODELS.items())}
    tensors = {f"{name}/{key}": x.contiguous() for name, model in golden.items() for key, x in model.items()}
    save_file(tensors, options.output, {"models": json.dumps(MODELS)})
    print(f"{options.output}: {options.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
