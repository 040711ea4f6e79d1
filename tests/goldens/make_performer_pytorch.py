"""Write performer_pytorch.safetensors: weights of small models of performer-pytorch 1.1.4, under our names, and what
they answer in float64.

    python tests/goldens/make_performer_pytorch.py --peer FOLDER_WITH_THE_PACKAGE

It adds an epsilon to the features of the softmax kernel, which are relative to the largest of the whole text, what is
to come included. That is no part of the paper's estimate, and not causal: here the epsilon is 0.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZES = {"num_tokens": 23, "max_seq_len": 24, "dim": 12, "depth": 2, "heads": 2, "dim_head": 6, "ff_mult": 1}
SIZES |= {"nb_features": 10, "rotary_position_emb": False, "qkv_bias": True, "attn_out_bias": True}
MODELS = {
    "softmax": {"causal": False},
    "softmax_causal": {"causal": True},
    "relu": {"causal": False, "generalized_attention": True},
    "relu_causal": {"causal": True, "generalized_attention": True},
}
NAMES = {
    "to_q": "mixer.q_proj",
    "to_k": "mixer.k_proj",
    "to_v": "mixer.v_proj",
    "to_out": "mixer.o_proj",
    "w1": "feed_forward.up_proj",
    "w2": "feed_forward.down_proj",
}


def our_name(name: str) -> str | None:
    outside = {
        "token_emb.weight": "embed_tokens.weight",
        "pos_emb.emb.weight": "embed_positions.embed_positions.weight",
    }
    if name in outside:
        return outside[name]
    if name.startswith("norm."):
        return name
    if not name.startswith("performer.net.layers."):
        return None  # the head, and second copies
    layer, part, *rest = name.removeprefix("performer.net.layers.").split(".")
    if rest[0] == "norm":
        return f"layers.{layer}.residual.norm.{('mixer', 'feed_forward')[int(part)]}.{rest[1]}"
    if rest[-1] == "projection_matrix":
        return f"layers.{layer}.mixer.features.value"
    return f"layers.{layer}.{NAMES[rest[-2]]}.{rest[-1]}"


@torch.no_grad()
def answers(package, fields: dict, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = package.PerformerLM(**(SIZES | fields)).double().eval()
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape)
        parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 0.4 * noise)
    ids = torch.randint(SIZES["num_tokens"], (2, 24))
    state = {our_name(name): tensor.float() for name, tensor in model.state_dict().items() if our_name(name)}
    package.softmax_kernel.__kwdefaults__["eps"] = 0.0
    package.causal_linear_attention_noncuda.__defaults__ = (128, 0.0)
    return {"ids": ids, "expected": model(ids, return_encodings=True)} | state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True, help="a folder with performer_pytorch and what it imports")
    sys.path.insert(0, parser.parse_args().peer)
    from performer_pytorch import performer_pytorch as package

    tensors = {
        f"{name}.{key}": tensor.contiguous()
        for seed, (name, fields) in enumerate(MODELS.items())
        for key, tensor in answers(package, fields, seed).items()
    }
    save_file(tensors, Path(__file__).with_name("performer_pytorch.safetensors"))


if __name__ == "__main__":
    main()
