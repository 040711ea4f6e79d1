"""Checkpoints of torchscale's RetNetDecoder, and of the ports for transformers that kept its names.

The official code divides scores and states by sizes that its norm per head takes out again, all but the norm's epsilon:
our outputs equal those of its forms as closely as these equal each other.
"""

import importlib
import math
from pathlib import Path

import torch
from torch import nn

from ...skeleton.conversion import Conversion, Fields, Rule, Tensors, require

ACTIVATIONS = {"swish": "silu", "gelu": "gelu", "relu": "relu"}
SIZES = {"decoder_embed_dim": 768, "decoder_value_embed_dim": 1280, "decoder_ffn_embed_dim": 1280}


def retnet_config(fields: Fields) -> Fields:
    """The defaults are torchscale's."""
    require(fields, decoder_normalize_before=True, deepnorm=False, moe_freq=0, multiway=False)
    require(fields, use_glu=True, use_lm_decay=False, activation_fn=tuple(ACTIVATIONS))  # the first two are of ports
    if fields.get("vocab_size", -1) < 1:
        raise ValueError("config.json does not say the vocab_size.")
    size, value_size, inner_size = (fields.get(name, default) for name, default in SIZES.items())
    tokens = {name: fields.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return tokens | {
        "vocab_size": fields["vocab_size"],
        "hidden_size": size,
        "value_expansion": value_size / size,
        "intermediate_size": inner_size,
        "num_hidden_layers": fields.get("decoder_layers", 12),
        "num_attention_heads": fields.get("decoder_retention_heads", 3),
        "hidden_act": ACTIVATIONS[fields.get("activation_fn", "gelu")],
        "norm_eps": fields.get("layernorm_eps", 1e-6),
        "embedding_norm": fields.get("layernorm_embedding", False),
        "hidden_dropout": fields.get("dropout", 0.0),
        "max_position_embeddings": fields.get("max_target_positions", 1024),
        "tie_word_embeddings": shares_embedding(fields) and embedding_scale(fields) == 1.0,
    }


def shares_embedding(fields: Fields) -> bool:
    return fields.get("share_decoder_input_output_embed") or fields.get("tie_word_embeddings") or False


def embedding_scale(fields: Fields) -> float:
    """What the official code multiplies embeddings by; we store the product."""
    size = fields.get("decoder_embed_dim", SIZES["decoder_embed_dim"])
    return 1.0 if fields.get("no_scale_embedding", True) else math.sqrt(size)


def scale_embedding(tensors: Tensors, fields: Fields) -> Tensors:
    """Scale the embedding, and give the output its own matrix where the two were one."""
    tensors = {name.removeprefix("model.").removeprefix("decoder."): tensor for name, tensor in tensors.items()}
    if "embed_tokens.weight" not in tensors:
        return tensors
    embedding = tensors["embed_tokens.weight"]
    if shares_embedding(fields) and not tensors.keys() & {"output_projection.weight", "lm_head.weight"}:
        tensors["output_projection.weight"] = embedding
    return tensors | {"embed_tokens.weight": embedding * embedding_scale(fields)}


def halves(weight: torch.Tensor, config) -> torch.Tensor:
    """Rows from (x0, y0, x1, y1, ...) in each head, where pairs are turned, to (x0, x1, ..., y0, y1, ...)."""
    return weight.unflatten(0, (config.num_attention_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def torchscale_model(folder: Path, fields: Fields, tensors: Tensors, head: str):
    """torchscale's own model, with the form that it trains."""
    try:
        decoder = importlib.import_module("torchscale.architecture.retnet").RetNetDecoder
        configuration = importlib.import_module("torchscale.architecture.config").RetNetConfig
    except ImportError as error:
        raise ImportError(
            f"Comparing with the original needs torchscale, which cannot be imported: {error}."
        ) from error
    embedding = nn.Embedding(fields["vocab_size"], fields.get("decoder_embed_dim", SIZES["decoder_embed_dim"]))
    model = decoder(configuration(**fields | {"chunkwise_recurrent": False}), embed_tokens=embedding)
    missing, unknown = model.load_state_dict(tensors, strict=False)
    if unknown or [name for name in missing if not name.startswith(("retnet_rel_pos.", "output_projection."))]:
        raise ValueError("The checkpoint is of a port: torchscale itself cannot load it to compare.")
    model.eval()
    return lambda ids: model(ids, features_only=head == "Model")[0]


RETNET = Conversion(
    model_type="retnet",
    mark="decoder_retention_heads",
    config=retnet_config,
    heads={"RetNetForCausalLM": "ForCausalLM", "RetNetModel": "Model"},
    default_head="ForCausalLM",
    prepare=scale_embedding,
    original=torchscale_model,
    rules=(
        Rule(r"retnet_rel_pos\.(?:angle|decay)"),  # computed
        Rule(r"embed_tokens\.weight", "model.embed_tokens.weight"),
        Rule(r"layernorm_embedding\.weight", "model.embed_norm.weight"),
        Rule(r"layer_norm\.weight", "model.norm.weight"),
        Rule(r"(?:output_projection|lm_head)\.weight", "lm_head.weight"),
        *(
            Rule(rf"layers\.(\d+)\.{theirs}\.weight", rf"model.layers.\1.{ours}.weight", change=change)
            for theirs, ours, change in (
                (r"retention\.([qk]_proj)", r"mixer.\2", halves),
                (r"retention\.([vg]_proj)", r"mixer.\2", None),
                (r"retention\.out_proj", "mixer.o_proj", None),
                (r"retention_layer_norm", "residual.norm.mixer", None),
                (r"ffn\.fc1", "feed_forward.gate_proj", None),  # the activation is on this one
                (r"ffn\.gate", "feed_forward.up_proj", None),
                (r"ffn\.fc2", "feed_forward.down_proj", None),
                (r"final_layer_norm", "residual.norm.feed_forward", None),
            )
        ),
    ),
)

CONVERSIONS = (RETNET,)
