"""Write hourglass_lucidrains.safetensors: weights of small models of lucidrains' hourglass-transformer-pytorch, and the
hidden states that they answer in float64.

    python tests/goldens/make_hourglass_lucidrains.py --peer FOLDER

FOLDER is where `pip install --no-deps --target FOLDER hourglass-transformer-pytorch==0.0.6 einops==0.8.2` put them. Its
texts have to be multiples of the factors: 0.0.6 pads others by a module that it does not import.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZES = {"num_tokens": 19, "dim": 6, "heads": 2, "dim_head": 4, "max_seq_len": 24}
MODELS = {
    "linear": SIZES | {"depth": (1, 1, 1), "shorten_factor": 3, "updown_sample_type": "linear"},
    "nested": SIZES | {"depth": (1, (1, 1, 1), 1), "shorten_factor": (2, 4)},
    "plain": SIZES
    | {"depth": (1, 1, 0), "shorten_factor": 4, "updown_sample_type": "linear", "attn_resampling": False},
    "encoder": SIZES | {"depth": (0, 1, 1), "shorten_factor": 3, "causal": False},
}


@torch.no_grad()
def answers(fields: dict, seed: int) -> dict[str, torch.Tensor]:
    from hourglass_transformer_pytorch import HourglassTransformerLM

    generator = torch.Generator().manual_seed(seed)
    model = HourglassTransformerLM(**fields).eval()
    for parameter in model.parameters():  # at which attention is far from uniform
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.3 * noise if parameter.ndim == 1 else 0.5 * noise
    weights = {f"weights.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(fields["num_tokens"], (2, fields["max_seq_len"]), generator=generator)
    model.to_logits = torch.nn.Identity()
    return weights | {"ids": ids, "answers": model.double()(ids)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="the folder that the packages are in")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("hourglass_lucidrains.safetensors"))
    options = parser.parse_args()
    sys.path.insert(0, options.peer)
    golden = {name: answers(fields, seed) for seed, (name, fields) in enumerate(MODELS.items())}
    tensors = {f"{model}.{key}": x.contiguous().clone() for model, found in golden.items() for key, x in found.items()}
    save_file(tensors, options.output, {"configs": json.dumps(MODELS)})
    print(f"{options.output}: {options.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
