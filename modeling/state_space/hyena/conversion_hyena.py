"""Checkpoints of HyenaDNA: those of the authors (LongSafari/hyenadna-tiny-1k-seqlen), trained with gradient
checkpointing or without, and those for transformers (-hf)."""

import importlib
import math
from pathlib import Path

import torch

from ...layers.implicit_filter import ImplicitFilter
from ...skeleton.conversion import Conversion, Fields, Rule, Tensors, require

TOKENS = {"pad_token_id": 4, "bos_token_id": 2, "eos_token_id": 1}  # of its tokenizer of nucleotides


def authors_config(fields: Fields) -> Fields:
    """The defaults are those of the authors' standalone code. What drops out embeddings alone is not taken over."""
    layer = {"order": 2, "filter_order": 64, "emb_dim": 3, "w": 1, "shift": 0.05} | fields["layer"]
    require(layer, _name_="hyena", short_filter_order=3, modulate=True, normalized=False, num_inner_mlps=2)
    require(layer, fast_decay_pct=0.3, slow_decay_pct=1.5, target=1e-2)
    require(fields, attn_layer_idx=(None, []), max_position_embeddings=0)
    return common(fields) | {
        "intermediate_size": fields["d_inner"],
        "max_position_embeddings": layer["l_max"],
        "hyena_order": layer["order"],
        "filter_order": layer["filter_order"],
        "filter_emb_dim": layer["emb_dim"],
        "filter_frequency": layer["w"],
        "filter_shift": layer["shift"],
        "norm_eps": fields.get("layer_norm_epsilon", 1e-5),
        "hidden_dropout": fields.get("resid_dropout", 0.0),
    }


def transformers_config(fields: Fields) -> Fields:
    require(fields, num_inner_mlps=2, train_freq=True, layer_norm_epsilon=1e-5, hyena_order=2)
    return common(fields) | {
        "intermediate_size": fields.get("d_inner") or 4 * fields["d_model"],
        "max_position_embeddings": fields.get("max_seq_len", 1024),
        "short_filter_order": fields.get("short_filter_order", 3),
        "filter_order": fields.get("filter_order", 64),
        "filter_emb_dim": fields.get("emb_dim", 3),
        "filter_frequency": fields.get("activation_freq", 1),
        "hidden_dropout": fields.get("hyena_dropout", 0.0),
        "tie_word_embeddings": fields.get("tie_word_embeddings", True),
    }


def common(fields: Fields) -> Fields:
    multiple = fields.get("pad_vocab_size_multiple", 1)
    tokens = {name: default if fields.get(name) is None else fields[name] for name, default in TOKENS.items()}
    return tokens | {
        "vocab_size": math.ceil(fields["vocab_size"] / multiple) * multiple,
        "hidden_size": fields["d_model"],
        "num_hidden_layers": fields["n_layer"],
        "tie_word_embeddings": True,
    }


def plain_names(tensors: Tensors, fields: Fields) -> Tensors:
    """Names without what wraps the backbone, or a layer under gradient checkpointing. Raises ValueError where the
    features of time, which ours computes, are others: some were trained."""
    plain = {}
    for name, tensor in tensors.items():
        for wrapping in ("model.", "hyena.", "backbone."):
            name = name.removeprefix(wrapping)
        plain[name.replace(".mixer.layer.", ".mixer.").replace(".mlp.layer.", ".mlp.")] = tensor
    for name, tensor in plain.items():
        if name.endswith("pos_emb.z") and not torch.allclose(tensor[0].float(), time_features(tensor), atol=1e-2):
            raise ValueError(
                f"{name} was trained; here filters are functions of a time that is computed. Only checkpoints whose "
                "lr_pos_emb was 0 can be converted."
            )
    return plain


def time_features(like: torch.Tensor) -> torch.Tensor:
    _, taps, features = like.shape
    return ImplicitFilter(1, 1, taps, (features, 1), 1.0, 0.0).time_features(taps, torch.float32)[1]


def authors_model(folder: Path, fields: Fields, tensors: Tensors, head: str):
    """The model of the authors' standalone file, where Python finds it."""
    try:
        theirs = importlib.import_module("standalone_hyenadna").HyenaDNAModel
    except ImportError as error:
        raise ImportError(
            "Comparing with the original needs standalone_hyenadna.py of github.com/HazyResearch/hyena-dna on the path "
            f"of Python, which cannot be imported: {error}."
        ) from error
    if "layer" not in fields:
        raise ValueError("The authors' code reads checkpoints in their own layout alone, not those for transformers.")
    model = theirs(**fields).eval()
    plain = plain_names(tensors, fields)
    model.backbone.load_state_dict({name: tensor for name, tensor in plain.items() if name != "lm_head.weight"})
    output = plain["embeddings.word_embeddings.weight"].T
    return lambda ids: model(ids) if head == "Model" else model(ids) @ output


def squeezed(tensor: torch.Tensor, config) -> torch.Tensor:
    return tensor.squeeze(0) if tensor.ndim == 2 else tensor.squeeze(1)


RULES = (
    Rule(r"layers\.\d+\.mixer\.filter_fn\.(?:pos_emb\.[zt]|modulation\.deltas)"),  # computed
    Rule(r"embeddings\.word_embeddings\.weight", "model.embed_tokens.weight"),
    Rule(r"ln_f\.(weight|bias)", r"model.norm.\1"),
    Rule(r"lm_head\.weight", "lm_head.weight"),
    *(
        Rule(rf"layers\.(\d+)\.{theirs}", rf"model.layers.\1.{ours}", change=change)
        for theirs, ours, change in (
            (r"mixer\.(in_proj|out_proj)\.(weight|bias)", r"mixer.\2.\3", None),
            (r"mixer\.short_filter\.weight", "mixer.convolution.weight", squeezed),
            (r"mixer\.short_filter\.bias", "mixer.convolution.bias", None),
            (r"mixer\.filter_fn\.bias", "mixer.filter.bias", None),
            (r"mixer\.filter_fn\.implicit_filter\.\d\.freq", "mixer.filter.frequency", squeezed),  # one, three times
            (r"mixer\.filter_fn\.implicit_filter\.0\.(weight|bias)", r"mixer.filter.embed_proj.\2", None),
            (r"mixer\.filter_fn\.implicit_filter\.2\.(weight|bias)", r"mixer.filter.first_proj.\2", None),
            (r"mixer\.filter_fn\.implicit_filter\.4\.(weight|bias)", r"mixer.filter.second_proj.\2", None),
            (r"mixer\.filter_fn\.implicit_filter\.6\.weight", "mixer.filter.tap_proj.weight", None),
            (r"mlp\.fc1\.(weight|bias)", r"feed_forward.up_proj.\2", None),
            (r"mlp\.fc2\.(weight|bias)", r"feed_forward.down_proj.\2", None),
            (r"norm1\.(weight|bias)", r"residual.norm.mixer.\2", None),
            (r"norm2\.(weight|bias)", r"residual.norm.feed_forward.\2", None),
        )
    ),
)
COMMON = {"rules": RULES, "prepare": plain_names, "default_head": "ForCausalLM", "original": authors_model}
HEADS = {"HyenaDNAForCausalLM": "ForCausalLM", "HyenaDNAModel": "Model"}

CONVERSIONS = (
    Conversion(model_type="hyenadna", config=transformers_config, heads=HEADS, **COMMON),
    Conversion(model_type="hyena-dna", mark="layer", config=authors_config, heads=HEADS, **COMMON),
)
