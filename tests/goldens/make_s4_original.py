"""Write s4_original.safetensors: weights of small S4 layers of the authors' code, and what they answer in float64.

    python tests/goldens/make_s4_original.py --peer CHECKOUT_OF_S4

The peer is github.com/state-spaces/s4, and wants numpy and einops.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file

SIZES = {"d_model": 4, "d_state": 8, "transposed": False}
MODELS = {
    "s4": {"mode": "s4", "init": "legs"},
    "s4 both ways": {"mode": "s4", "init": "legs", "bidirectional": True},
    "s4d lin zoh": {"mode": "s4d", "init": "diag-lin", "disc": "zoh"},
    "s4d inv bilinear": {"mode": "s4d", "init": "diag-inv", "disc": "bilinear"},
    "s4d legs zoh both ways": {"mode": "s4d", "init": "diag-legs", "disc": "zoh", "bidirectional": True},
    "s4d real bilinear": {"mode": "s4d", "init": "diag-real", "disc": "bilinear"},
}
LENGTH = 140
ABSENT = ("pytorch_lightning", "pytorch_lightning.utilities", "scipy")


@torch.no_grad()
def answers(fields: dict, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    block = importlib.import_module("models.s4.s4").S4Block(**(SIZES | fields)).eval()
    start = {f"start.{name}": getattr(block.layer.kernel, name).clone() for name in ("A_real", "A_imag")}
    for name, parameter in block.named_parameters():  # S4D-Real has no frequencies to begin with
        parameter.add_(0.1 * torch.randn(parameter.shape).abs() if "A_" in name else 0.2 * torch.randn(parameter.shape))
    block.double()
    state = {f"weights.{name}": tensor.clone() for name, tensor in block.state_dict().items() if "l_kernel" not in name}
    x = torch.randn(1, LENGTH, SIZES["d_model"], dtype=torch.float64)
    return state | start | {"x": x, "y": block(x)[0]}  # the forward pass writes to C


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="a checkout of github.com/state-spaces/s4")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("s4_original.safetensors"))
    options = parser.parse_args()
    sys.path.insert(0, options.peer)
    sys.modules |= {name: MagicMock() for name in ABSENT}
    golden = {name: answers(fields, seed) for seed, (name, fields) in enumerate(MODELS.items())}
    tensors = {f"{name}/{key}": x.contiguous() for name, model in golden.items() for key, x in model.items()}
    save_file(tensors, options.output, {"models": json.dumps(MODELS)})
    print(f"{options.output}: {options.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
