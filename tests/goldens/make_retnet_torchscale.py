"""Write retnet_torchscale.safetensors: weights of small torchscale RetNets, and what they answer in float64.

    python tests/goldens/make_retnet_torchscale.py --peer CHECKOUT_OF_TORCHSCALE

Two models, one plain, one with the options that change the conversion, in the parallel and in the recurrent form. The
original narrows to float32 in norms, activations and decay rates: here it must not. Its forms agree only where the
epsilon of the norms is tiny, since they scale differently what the norm per head divides out again.
"""

import argparse
import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file

SIZES = {
    "decoder_embed_dim": 16,
    "decoder_value_embed_dim": 24,
    "decoder_ffn_embed_dim": 20,
    "decoder_layers": 2,
    "decoder_retention_heads": 4,
    "vocab_size": 23,
    "layernorm_eps": 1e-18,
}
MODELS = {
    "plain": SIZES | {"activation_fn": "swish"},
    "shared": SIZES
    | {
        "activation_fn": "gelu",
        "no_scale_embedding": False,
        "share_decoder_input_output_embed": True,
        "layernorm_embedding": True,
    },
}
ABSENT = ("fairscale", "fairscale.nn", "timm", "timm.models", "timm.models.layers", "einops")


def scaled(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights at which attention is far from uniform, exact in float32."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (1 + 0.2 * noise if parameter.ndim == 1 else 0.5 * noise).double()


@torch.no_grad()
def answers(fields: dict, seed: int) -> dict[str, torch.Tensor]:
    from torchscale.architecture.config import RetNetConfig
    from torchscale.architecture.retnet import RetNetDecoder

    embedding = torch.nn.Embedding(fields["vocab_size"], fields["decoder_embed_dim"])
    model = RetNetDecoder(RetNetConfig(**fields), embed_tokens=embedding).double().eval()
    generator = torch.Generator().manual_seed(seed)
    scaled(model, generator)
    head = torch.arange(fields["decoder_retention_heads"], dtype=torch.float64)
    model.retnet_rel_pos.decay = torch.log(1 - 2 ** (-5 - head))

    ids = torch.randint(fields["vocab_size"], (2, 20), generator=generator)
    memory: dict = {}
    steps = [model(ids[:, : t + 1], incremental_state=memory)[0][:, -1] for t in range(ids.shape[1])]
    parallel, recurrent = model(ids)[0], torch.stack(steps, dim=1)
    print(f"largest difference between the forms: {(parallel - recurrent).abs().max():.1e}")
    state = {f"weights.{name}": tensor.to(torch.float32) for name, tensor in model.state_dict().items()}
    if fields.get("share_decoder_input_output_embed"):
        del state["weights.output_projection.weight"]
    return state | {"ids": ids, "parallel": parallel, "recurrent": recurrent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="a checkout of github.com/microsoft/torchscale")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("retnet_torchscale.safetensors"))
    options = parser.parse_args()
    sys.path.insert(0, options.peer)
    sys.modules |= {name: MagicMock() for name in ABSENT}
    torch.Tensor.float = lambda tensor: tensor
    golden = {name: answers(fields, seed) for seed, (name, fields) in enumerate(MODELS.items())}
    tensors = {f"{name}.{key}": x.contiguous() for name, model in golden.items() for key, x in model.items()}
    save_file(tensors, options.output, {"configs": json.dumps(MODELS)})
    print(f"{options.output}: {options.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
