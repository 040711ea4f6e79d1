"""Write routing_transformer_lucidrains.safetensors: weights of small models of lucidrains' routing-transformer, and
what they answer in float64.

    python tests/goldens/make_routing_transformer.py --peer FOLDER

FOLDER is where `pip install --no-deps --target FOLDER routing-transformer==1.6.1 local-attention==1.4.3
product-key-memory==0.1.10 mixture-of-experts==0.2.3 einops==0.8.2` put them. Of encoders the answers are hidden states.
The decoder has one cluster, as large as its text: with more, its later tokens change what earlier ones see. The
original makes its rotations in float32: here it must not.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZES = {"num_tokens": 23, "dim": 12, "depth": 2, "heads": 4, "dim_head": 6, "max_seq_len": 40}
MODELS = {
    "encoder": SIZES | {"window_size": 8, "n_local_attn_heads": (2, 0), "local_attn_window_size": 10, "ff_glu": True},
    "decoder": SIZES
    | {"window_size": 40, "n_local_attn_heads": (1, 4), "local_attn_window_size": 5, "causal": True}
    | {"tie_embedding": True},
}


@torch.no_grad()
def answers(fields: dict, seed: int) -> dict[str, torch.Tensor]:
    from routing_transformer import RoutingTransformerLM

    generator = torch.Generator().manual_seed(seed)
    model = RoutingTransformerLM(**fields, _register_kmeans_update=False).eval()
    for parameter in model.parameters():  # at which attention is far from uniform
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.2 * noise if parameter.ndim == 1 else 0.5 * noise
    for name, buffer in model.named_buffers():
        if name.endswith("kmeans.means"):
            means = torch.randn(buffer.shape, generator=generator)
            buffer.copy_(torch.nn.functional.normalize(means, dim=-1))
        elif name.endswith("initted"):
            buffer.fill_(True)
    weights = {f"weights.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    model.double()
    dim, length = fields["dim_head"], fields["max_seq_len"]
    frequency = (1.0 / (10000 ** (torch.arange(0, dim, 2).float() / dim))).double()
    angle = torch.arange(length).double()[:, None] * frequency
    model.sinu_pos_emb.emb = torch.cat((angle.sin(), angle.cos()), dim=-1)

    ids = torch.randint(fields["num_tokens"], (2, length), generator=generator)
    hidden = []
    model.norm.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    logits, _ = model(ids)
    return weights | {"ids": ids, "answers": logits if fields.get("causal") else hidden[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="the folder that the packages are in")
    name = "routing_transformer_lucidrains.safetensors"
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name(name))
    options = parser.parse_args()
    sys.path.insert(0, options.peer)
    golden = {name: answers(fields, seed) for seed, (name, fields) in enumerate(MODELS.items())}
    tensors = {f"{model}.{key}": x.contiguous().clone() for model, found in golden.items() for key, x in found.items()}
    save_file(tensors, options.output, {"configs": json.dumps(MODELS)})
    print(f"{options.output}: {options.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
