"""Checkpoints of transformers' Reformer (google/reformer-enwik8, google/reformer-crime-and-punishment)."""

import math

import torch
from transformers import ReformerConfig

from ...skeleton.conversion import Conversion, Fields, Rule, Tensors, require
from .configuration_reformer import ArchReformerConfig

ROTATIONS = "reformer.encoder.layers.{}.attention.self_attention.rotations"
SAME = ("vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings", "hidden_act")
SAME += ("lsh_attn_chunk_length", "local_attn_chunk_length", "num_hashes", "initializer_range")
SAME += ("pad_token_id", "bos_token_id", "eos_token_id")


def reformer_config(fields: Fields, bucketing: str | None = None) -> Fields:
    """`bucketing` "sorted" answers as transformers does; by default a causal model is made causal in truth."""
    chunks = {f"{kind}_num_chunks_{side}": n for kind in ("lsh", "local") for side, n in (("before", 1), ("after", 0))}
    require(fields, **chunks)
    config = ReformerConfig.from_dict(fields)
    return {name: getattr(config, name) for name in SAME} | {
        "direction": "causal" if config.is_decoder else "bidirectional",
        "bucketing": bucketing,
        "num_hidden_layers": len(config.attn_layers),
        "layer_types": [f"{kind}_attention" for kind in config.attn_layers],
        "head_dim": config.attention_head_size,
        "intermediate_size": config.feed_forward_size,
        "num_buckets": buckets_of(config),
        "norm_eps": config.layer_norm_eps,
        "position_type": "axial" if config.axial_pos_embds else "learned",
        "axial_pos_shape": list(config.axial_pos_shape) if config.axial_pos_embds else None,
        "axial_pos_embds_dim": list(config.axial_pos_embds_dim) if config.axial_pos_embds else None,
        "hidden_dropout": config.hidden_dropout_prob,
        "attention_dropout": config.local_attention_probs_dropout_prob,
    }


def buckets_of(config: ReformerConfig) -> int | list[int]:
    """Where none are said, twice the blocks of the longest text, as a power of two."""
    if config.num_buckets is None:
        return 2 ** math.floor(math.log2(max(2, 2 * (config.max_position_embeddings // config.lsh_attn_chunk_length))))
    return config.num_buckets if isinstance(config.num_buckets, int) else list(config.num_buckets)


def with_rotations(tensors: Tensors, fields: Fields) -> Tensors:
    """transformers draws them at each call, all alike where there is a `hash_seed`; ours are drawn once."""
    config, seed = ArchReformerConfig(**reformer_config(fields)), fields.get("hash_seed")
    generator = torch.Generator().manual_seed(seed or 0)
    shape = config.num_attention_heads, config.head_dim, config.num_hashes, sum(config.bucket_factors) // 2
    for layer, kind in enumerate(config.layer_types):
        if kind == "lsh_attention":
            generator = generator if seed is None else generator.manual_seed(seed)
            tensors = tensors | {ROTATIONS.format(layer): torch.randn(shape, generator=generator)}
    return tensors


def flat(tensor: torch.Tensor, config) -> torch.Tensor:
    """The vectors of an axis, which theirs keeps as a grid."""
    return tensor.flatten(0, 1)


REFORMER = Conversion(
    model_type="reformer",
    config=reformer_config,
    choices=("bucketing",),
    heads={
        "ReformerModelWithLMHead": "ForCausalLM",
        "ReformerModel": "Model",
        "ReformerForQuestionAnswering": "ForQuestionAnswering",
    },
    default_head="ForCausalLM",
    prepare=with_rotations,
    rules=(
        Rule(r".*mask_value_float(16|32)"),
        Rule(r"lm_head\.(?:decoder\.)?bias"),  # which transformers adds to nothing
        Rule(r"lm_head\.decoder\.weight", "lm_head.weight"),
        Rule(r"(qa_outputs\.\w+)", r"\1"),
        Rule(r"(?:reformer\.)?encoder\.layer_norm\.(\w+)", r"model.norm.\1"),
        *(
            Rule(rf"(?:reformer\.)?embeddings\.{theirs}", rf"model.{ours}.weight", change=change)
            for theirs, ours, change in (
                (r"word_embeddings\.weight", "embed_tokens", None),
                (r"position_embeddings\.embedding\.weight", "embed_positions.embed_positions", None),
                (r"position_embeddings\.weights\.0", "embed_positions.embed_rows", flat),
                (r"position_embeddings\.weights\.1", "embed_positions.embed_columns", flat),
            )
        ),
        *(
            Rule(rf"(?:reformer\.)?encoder\.layers\.(\d+)\.{theirs}", rf"model.layers.\1.{ours}")
            for theirs, ours in (
                (r"attention\.layer_norm\.(\w+)", r"residual.norm.mixer.\2"),
                (r"attention\.self_attention\.rotations", "mixer.rotations"),
                (r"attention\.self_attention\.query_key\.weight", "mixer.qk_proj.weight"),
                (r"attention\.self_attention\.([qkv])(?:uery|ey|alue)\.weight", r"mixer.\2_proj.weight"),
                (r"attention\.output\.dense\.weight", "mixer.o_proj.weight"),
                (r"feed_forward\.layer_norm\.(\w+)", r"residual.norm.feed_forward.\2"),
                (r"feed_forward\.dense\.dense\.(\w+)", r"feed_forward.up_proj.\2"),
                (r"feed_forward\.output\.dense\.(\w+)", r"feed_forward.down_proj.\2"),
            )
        ),
    ),
)

CONVERSIONS = (REFORMER,)
