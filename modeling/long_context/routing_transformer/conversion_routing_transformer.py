"""Checkpoints of lucidrains' routing-transformer (`RoutingTransformerLM`, PyPI, 1.6.1): tensors alone, which tell the
sizes but one.

An encoder answers as it did there where a local head's block holds the text, or none is local. A decoder does where
one cluster holds the text: else there each cluster takes the tokens nearest to it of the whole text, so that later
tokens change what earlier ones see, which ours do not.
"""

import re

import torch

from ...ops.clustered_attention import NO_DIVISION_BY_ZERO
from ...skeleton.conversion import Conversion, Fields, Rule, Tensors

LAYERS = "routing_transformer.layers.layers"
TRAINED = 10**6  # steps that centroids have had, of which the original keeps no count
LAYER = r"routing_transformer\.layers\.layers\.(\d+)\."


def describe(tensors: Tensors) -> Fields:
    """What a config would say; nothing of other models."""
    layers = [int(match[1]) for name in tensors if (match := re.fullmatch(LAYER + r"0\.fn\.to_out\.weight", name))]
    routing = [layer for layer in sorted(layers) if f"{LAYERS}.{layer}.0.fn.global_attn.kmeans.means" in tensors]
    if not routing:
        return {}
    if any(tensor.numel() for name, tensor in tensors.items() if name.endswith(("mem_key", "mem_value"))):
        raise ValueError("This routing-transformer has memories beside its tokens (num_mem_kv), which ours has not.")
    if any(f"{LAYERS}.{layer}.1.fn.fn.w1.weight" not in tensors for layer in layers):
        raise ValueError("This routing-transformer has feed-forwards of experts or of a product-key memory.")
    name = f"{LAYERS}.{routing[0]}."
    routed, clusters, dim = tensors[f"{name}0.fn.global_attn.kmeans.means"].shape
    vocabulary, size = tensors["token_emb.weight"].shape
    local = [
        len(tensors.get(f"{LAYERS}.{layer}.0.fn.local_to_qkv.weight", ())) // (3 * dim) for layer in sorted(layers)
    ]
    inner = tensors[f"{name}1.fn.fn.w2.weight"].shape[1]
    causal = f"{name}0.fn.to_k.weight" not in tensors  # its decoders share queries and keys
    return {
        "model_type": "routing-transformer",
        "architectures": ["RoutingTransformerLM" if causal else "RoutingTransformer"],
        "causal": causal,
        "vocab_size": vocabulary,
        "hidden_size": size,
        "intermediate_size": inner,
        "num_hidden_layers": len(layers),
        "num_attention_heads": local[routing[0]] + routed,
        "num_local_heads": local,
        "head_dim": dim,
        "num_clusters": clusters,
        "cluster_length": len(tensors["sinu_pos_emb.emb"]) // clusters,
        "max_position_embeddings": len(tensors["sinu_pos_emb.emb"]),
        "gated": len(tensors[f"{name}1.fn.fn.w1.weight"]) > inner,
    }


def routing_transformer_config(fields: Fields, local_window: int | None = None) -> Fields:
    """A local head there sees a block and the one before it: `local_window` is the length of both."""
    told = {name: value for name, value in fields.items() if name not in ("model_type", "architectures")}
    causal, length, gated = told.pop("causal"), told.pop("cluster_length"), told.pop("gated")
    return told | {
        "direction": "causal" if causal else "bidirectional",
        "cluster_size": 2 * length if causal else length,
        "local_window": local_window or 2 * length,
        "feed_forward_types": ["gated" if gated else "dense"] * told["num_hidden_layers"],
        "routed_norm": "unit",
        "rotary_routed": True,
        "attention_bias": True,
        "mlp_bias": True,
    }


def prepare(tensors: Tensors, fields: Fields) -> Tensors:
    """Each projection of local and routed heads as one, and of what is tied both."""
    left = dict(tensors)
    for layer, local in enumerate(fields["num_local_heads"]):
        attention = f"{LAYERS}.{layer}.0.fn."
        parts = {name.removeprefix(attention): left.pop(name) for name in list(left) if name.startswith(attention)}
        left |= {attention + name: tensor for name, tensor in of_layer(parts, local, fields).items()}
    if "out.tensor" in left:
        left["out.weight"] = left.pop("out.tensor")
        left["out.bias"] = torch.zeros_like(left["out.weight"][:, 0])
    return left


def of_layer(parts: Tensors, local: int, fields: Fields) -> Tensors:
    """What a layer's heads have, local ones first. Rotations of routed ones turn neighbours there, here halves; and
    their mean over the clusters that took a token divides by 1 + 1e-5 where there is one cluster."""
    dim, made = fields["head_dim"], {}
    halves = torch.cat((torch.arange(0, dim, 2), torch.arange(1, dim, 2)))
    for number, part in enumerate("qkv"):
        near = {kind: parts[f"local_to_qkv.{kind}"].chunk(3)[number] for kind in ("weight", "bias") if local}
        pieces = [near] if local else []
        if f"to_{part}.weight" in parts and "global_attn.kmeans.means" in parts:
            weight = parts[f"to_{part}.weight"].unflatten(0, (-1, dim))[:, halves].flatten(0, 1)
            pieces.append({"weight": weight, "bias": torch.zeros_like(weight[:, 0])})
        for kind in ("weight", "bias") if pieces else ():
            made[f"{part}.{kind}"] = torch.cat([piece[kind] for piece in pieces])
    out = parts["to_out.weight"].unflatten(1, (-1, dim))
    share = 1 + NO_DIVISION_BY_ZERO if fields["causal"] else 1
    made["out.weight"] = torch.cat((out[:, :local], out[:, local:, halves] / share), dim=1).flatten(1)
    made["out.bias"] = torch.zeros_like(out[:, 0, 0])
    if "global_attn.kmeans.means" in parts:
        made["means"] = parts["global_attn.kmeans.means"][..., halves]
        made["steps"] = parts["global_attn.kmeans.initted"].long() * TRAINED
    return made


def inner(match, config) -> list[str]:
    layer, kind = match.groups()
    names = ("gate_proj", "up_proj") if "gated" in config.feed_forward_types else ("up_proj",)
    return [f"model.layers.{layer}.feed_forward.{name}.{kind}" for name in names]


def gate_and_up(tensor: torch.Tensor, config) -> tuple[torch.Tensor, ...]:
    return tensor.chunk(2) if "gated" in config.feed_forward_types else (tensor,)


ROUTING_TRANSFORMER = Conversion(
    model_type="routing-transformer",
    config=routing_transformer_config,
    describe=describe,
    choices=("local_window",),
    heads={"RoutingTransformerLM": "ForCausalLM", "RoutingTransformer": "Model"},
    default_head="ForCausalLM",
    prepare=prepare,
    rules=(
        Rule(r"sinu_pos_emb\.emb"),  # computed
        Rule(r"token_emb\.weight", "model.embed_tokens.weight"),
        Rule(r"norm\.(weight|bias)", r"model.norm.\1"),
        Rule(r"out\.(weight|bias)", r"lm_head.\1"),
        Rule(LAYER + r"0\.norm\.(weight|bias)", r"model.layers.\1.residual.norm.mixer.\2"),
        Rule(LAYER + r"1\.norm\.(weight|bias)", r"model.layers.\1.residual.norm.feed_forward.\2"),
        Rule(LAYER + r"0\.fn\.([qkv])\.(weight|bias)", r"model.layers.\1.mixer.\2_proj.\3"),
        Rule(LAYER + r"0\.fn\.out\.(weight|bias)", r"model.layers.\1.mixer.o_proj.\2"),
        Rule(LAYER + r"0\.fn\.means", r"model.layers.\1.mixer.centroids.value"),
        Rule(LAYER + r"0\.fn\.steps", r"model.layers.\1.mixer.centroids.steps"),
        Rule(LAYER + r"1\.fn\.fn\.w1\.(weight|bias)", inner, change=gate_and_up),
        Rule(LAYER + r"1\.fn\.fn\.w2\.(weight|bias)", r"model.layers.\1.feed_forward.down_proj.\2"),
    ),
)

CONVERSIONS = (ROUTING_TRANSFORMER,)
