"""Write hyena_original.safetensors: weights of small HyenaDNA models, and what the authors' code answers in float64.

    python tests/goldens/make_hyena_original.py --peer CHECKOUT_OF_HYENA_DNA

Two models: one of the released order, one of order 3 with other sizes. Time features are made in float64, as ours are,
and the stream is not narrowed to float32.
"""

import argparse
import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file

LAYER = {"_name_": "hyena", "emb_dim": 5, "filter_order": 16, "short_filter_order": 3, "l_max": 100, "modulate": True}
LAYER |= {"w": 10, "lr": 6e-4, "wd": 0.0, "lr_pos_emb": 0.0}
FIELDS = {"d_model": 12, "n_layer": 2, "d_inner": 16, "vocab_size": 12, "resid_dropout": 0.0, "embed_dropout": 0.1}
FIELDS |= {"residual_in_fp32": False, "pad_vocab_size_multiple": 8, "checkpoint_mixer": False, "layer": LAYER}
MODELS = {
    "released": FIELDS,
    "third order": FIELDS | {"layer": LAYER | {"order": 3, "emb_dim": 3, "filter_order": 8, "w": 1, "l_max": 99}},
}
ABSENT = ("torchvision", "torchvision.ops", "einops", "transformers", "transformers.tokenization_utils")


def rearrange(x: torch.Tensor, pattern: str, o: int = 1) -> torch.Tensor:
    """What the authors ask of einops."""
    return {
        "b l d -> b d l": lambda: x.transpose(1, 2),
        "b d l -> b l d": lambda: x.transpose(1, 2),
        "l (o d) -> o d l": lambda: x.unflatten(1, (o, -1)).permute(1, 2, 0),
        "(o d) -> o d": lambda: x.unflatten(0, (o, -1)),
    }[pattern]()


@torch.no_grad()
def answers(fields: dict, seed: int) -> dict[str, torch.Tensor]:
    from standalone_hyenadna import HyenaDNAModel

    model = HyenaDNAModel(**json.loads(json.dumps(fields))).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        near_one = name.endswith(("norm1.weight", "norm2.weight", "ln_f.weight"))
        scale = 0.1 if "implicit_filter" in name else 0.3  # their sines turn ten times as far
        parameter.data = (1 + 0.2 * noise if near_one else 10 + noise if "freq" in name else scale * noise).double()
    ids = torch.randint(fields["vocab_size"], (2, 80), generator=generator)
    state = {f"weights.model.{name}": tensor.float() for name, tensor in model.state_dict().items()}
    return state | {"ids": ids, "hidden_states": model(ids)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="a checkout of github.com/HazyResearch/hyena-dna")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("hyena_original.safetensors"))
    options = parser.parse_args()
    sys.path.insert(0, options.peer)
    sys.modules |= {name: MagicMock() for name in ABSENT}
    sys.modules["torchvision.ops"].StochasticDepth = lambda *told, **more: torch.nn.Identity()
    sys.modules["einops"].rearrange = rearrange
    sys.modules["transformers.tokenization_utils"].PreTrainedTokenizer = object
    torch.set_default_dtype(torch.float64)
    golden = {name: answers(fields, seed) for seed, (name, fields) in enumerate(MODELS.items())}
    tensors = {f"{name}.{key}": x.contiguous().clone() for name, model in golden.items() for key, x in model.items()}
    save_file(tensors, options.output, {"configs": json.dumps(MODELS)})
    print(f"{options.output}: {options.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
