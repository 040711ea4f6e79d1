"""The whole zoo on one page: a row per architecture."""

import difflib

from hf_arch.architecture import DECODER, ENCODER, ENCODER_DECODER, Architecture

FULL_ATTENTION = {
    "bounded state": "Full attention looks at every earlier key: the cache grows with the text.",
    "bounded step": "And so does a step.",
    "linear cost": "Full attention compares all pairs of tokens.",
}
ENCODER_ALONE = {
    head: {"is_encoder_decoder": False} for head in ENCODER_DECODER if head not in ("Model", "ForConditionalGeneration")
}

ARCHITECTURES = (
    Architecture(
        "transformer",
        "ArchTransformer",
        family="dense",
        title="Transformer",
        paper="arXiv:1706.03762",
        heads=(*DECODER, "ForMaskedLM"),
        tiny={"num_key_value_heads": 2},
        head_fields={"ForMaskedLM": {"direction": "bidirectional"}},
        exceptions=FULL_ATTENTION,
    ),
    Architecture(
        "encoder_decoder",
        "ArchEncoderDecoder",
        family="dense",
        title="Encoder-decoder Transformer (T5)",
        paper="arXiv:1910.10683",
        heads=ENCODER_DECODER,
        tiny={"attention_scaling": 1.0},
        head_fields=ENCODER_ALONE,
        exceptions=FULL_ATTENTION,
    ),
    Architecture(
        "retnet",
        "ArchRetNet",
        family="state_space",
        title="RetNet",
        paper="arXiv:2307.08621",
        lora_targets=("q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    Architecture(
        "s4",
        "ArchS4",
        family="state_space",
        title="S4 and S4D",
        paper="arXiv:2111.00396",
        heads=(*DECODER, "ForMaskedLM"),
        lora_targets=("out_proj", "gate_proj", "up_proj", "down_proj"),
        tiny={"state_size": 8, "layer_types": ["s4d", "s4"], "feed_forward_types": ["none", "gated"]},
        head_fields={"ForMaskedLM": {"direction": "bidirectional"}},
    ),
    Architecture(
        "h3",
        "ArchH3",
        family="state_space",
        title="H3",
        paper="arXiv:2212.14052",
        tiny={"state_size": 8, "state_head_dim": 2},
    ),
    Architecture(
        "s6",
        "ArchS6",
        family="state_space",
        title="S6 (Mamba)",
        paper="arXiv:2312.00752",
        lora_targets=("in_proj", "x_proj", "dt_proj", "out_proj", "gate_proj", "up_proj", "down_proj"),
        tiny={"state_size": 8, "feed_forward_types": ["none", "gated"]},
    ),
    Architecture(
        "ssd",
        "ArchSSD",
        family="state_space",
        title="SSD (Mamba-2)",
        paper="arXiv:2405.21060",
        lora_targets=("in_proj", "out_proj", "gate_proj", "up_proj", "down_proj"),
        tiny={"state_size": 8, "n_groups": 2, "feed_forward_types": ["none", "gated"]},
    ),
    Architecture(
        "rwkv4",
        "ArchRWKV4",
        family="state_space",
        title="RWKV-4",
        paper="arXiv:2305.13048",
        lora_targets=("receptance", "key", "value", "output", "gate_proj", "up_proj", "down_proj"),
    ),
    Architecture(
        "rwkv7",
        "ArchRWKV7",
        family="state_space",
        title="RWKV-7 (Goose)",
        paper="arXiv:2503.14456",
        lora_targets=("r_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        tiny={f"{name}_low_rank_dim": 6 for name in ("decay", "a", "v", "gate")},
    ),
    Architecture(
        "hyena",
        "ArchHyena",
        family="state_space",
        title="Hyena",
        paper="arXiv:2302.10866",
        lora_targets=(
            *("in_proj", "out_proj", "embed_proj", "first_proj", "second_proj", "tap_proj"),
            *("gate_proj", "up_proj", "down_proj"),
        ),
        tiny={"filter_frequency": 1.0},
        exceptions={
            "bounded state": "A filter is as long as the text: the cache holds all earlier tokens, up to "
            "max_position_embeddings. Layers of type modal_hyena, into which `hf_arch.distill` turns the "
            "others, keep a small state of fixed size.",
            "bounded step": "And a step reads them.",
        },
    ),
    Architecture(
        "hybrid",
        "ArchHybrid",
        family="state_space",
        title="Hybrid (Samba, Jamba)",
        paper="arXiv:2406.07522",
        lora_targets=("q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "in_proj", "x_proj", "dt_proj", "out_proj")
        + ("gate_proj", "up_proj", "down_proj"),
        tiny={"sliding_window": 9, "mixer_options": {"s6": {"state_size": 8}}},
        exceptions={
            "padding does not enter the state": "transformers' cache of a window counts columns, padding included.",
            "assisted decoding": "A window forgets what a recurrence would have to read again.",
        },
    ),
    Architecture(
        "transformer_xl",
        "ArchTransformerXL",
        family="long_context",
        title="Transformer-XL",
        paper="arXiv:1901.02860",
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "r_proj", "gate_proj", "up_proj", "down_proj"),
        tiny={"segment_length": 16, "memory_length": 20},
    ),
    Architecture(
        "routing_transformer",
        "ArchRoutingTransformer",
        family="long_context",
        title="Routing Transformer",
        paper="arXiv:2003.05997",
        heads=(*DECODER, "ForMaskedLM"),
        tiny={"num_clusters": 4, "cluster_size": 16, "num_local_heads": 2, "local_window": 12},
        head_fields={"ForMaskedLM": {"direction": "bidirectional"}},
    ),
    Architecture(
        "compressive_transformer",
        "ArchCompressiveTransformer",
        family="long_context",
        title="Compressive Transformer",
        paper="arXiv:1911.05507",
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "r_proj", "gate_proj", "up_proj", "down_proj", "kernel"),
        tiny={
            "segment_length": 8,
            "memory_length": 12,
            "compressed_memory_length": 5,
            "compression_rate": 4,
        },
    ),
    Architecture(
        "longformer",
        "ArchLongformer",
        family="long_context",
        title="Longformer",
        paper="arXiv:2004.05150",
        heads=(*ENCODER, "ForCausalLM"),
        lora_targets=(
            *("q_proj", "k_proj", "v_proj", "o_proj", "q_global_proj", "k_global_proj", "v_global_proj"),
            *("up_proj", "down_proj"),
        ),
        tiny={"attention_window": 8, "num_global_tokens": 1},
        head_fields={"ForCausalLM": {"direction": "causal", "num_global_tokens": 2, "tie_word_embeddings": False}},
    ),
    Architecture(
        "sparse_transformer",
        "ArchSparseTransformer",
        family="long_context",
        title="Sparse Transformer (GPT-3, LongNet, attention sinks)",
        paper="arXiv:1904.10509",
        tiny={"sliding_window": 9, "stride": 8, "summary_columns": 2, "tie_word_embeddings": False}
        | {"dilated_segments": [8, 32], "dilations": [1, 2]},
        exceptions={
            "bounded state": "Dense layers look at every earlier key, and so does, in the end, the text that strided, "
            "fixed, dilated and retrieving ones see: their caches grow. Those of layers of type sliding_attention and "
            "sink_attention do not.",
            "bounded step": "And a step of a dense layer reads all of its cache; one of type retrieval_attention as "
            "many keys at any length, and a bound for each block.",
            "linear cost": "Dense layers compare all pairs of tokens; strided and fixed ones n (stride + n / stride), "
            "retrieving ones each token with each block, the others as many as their windows show.",
            "padding does not enter the state": "transformers' cache of a window counts columns, padding included; "
            "that of sink_attention counts real tokens.",
        },
    ),
    Architecture(
        "reformer",
        "ArchReformer",
        family="long_context",
        title="Reformer",
        paper="arXiv:2001.04451",
        heads=(*DECODER, "ForMaskedLM"),
        lora_targets=("qk_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        tiny={"lsh_attn_chunk_length": 4, "local_attn_chunk_length": 8, "num_buckets": [2, 2], "num_hashes": 2},
        head_fields={"ForMaskedLM": {"direction": "bidirectional", "local_attn_chunk_length": 20}},
    ),
    Architecture(
        "bigbird",
        "ArchBigBird",
        family="long_context",
        title="BigBird",
        paper="arXiv:2007.14062",
        heads=(*ENCODER, "ForCausalLM"),
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
        tiny={"block_size": 4, "num_random_blocks": 2},
        head_fields={"ForCausalLM": {"direction": "causal", "tie_word_embeddings": False}},
        exceptions={
            "bounded state": "A block at random may be any of the earlier ones: the cache holds all keys. A step reads "
            "those that it sees, as many after any text.",
        },
    ),
    Architecture(
        "performer",
        "ArchPerformer",
        family="long_context",
        title="Performer",
        paper="arXiv:2009.14794",
        heads=(*DECODER, "ForMaskedLM"),
        tiny={"num_key_value_heads": 2},
        head_fields={"ForMaskedLM": {"direction": "bidirectional"}},
    ),
    Architecture(
        "mixtral",
        "ArchMixtral",
        family="moe",
        title="Mixtral",
        paper="arXiv:2401.04088",
        tiny={"num_key_value_heads": 2, "num_local_experts": 4},
        exceptions=FULL_ATTENTION,
    ),
    Architecture(
        "mixture_of_depths",
        "ArchMixtureOfDepths",
        family="moe",
        title="Mixture-of-Depths",
        paper="arXiv:2404.02258",
        lora_targets=(
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            *("in_proj", "out_proj"),
        ),
        tiny={"num_key_value_heads": 2, "capacity": 0.5, "predictor_size": 20},
        exceptions=FULL_ATTENTION,
    ),
    Architecture(
        "switch",
        "ArchSwitch",
        family="moe",
        title="Switch Transformer",
        paper="arXiv:2101.03961",
        heads=(*ENCODER_DECODER, "ForCausalLM"),
        tiny={"num_local_experts": 4, "router_jitter_noise": 0.0, "attention_scaling": 1.0},
        head_fields=ENCODER_ALONE | {"ForCausalLM": {"is_encoder_decoder": False, "is_decoder": True}},
        exceptions=FULL_ATTENTION,
    ),
    Architecture(
        "deepseek",
        "ArchDeepSeek",
        family="moe",
        title="DeepSeek (V2, V3)",
        paper="arXiv:2412.19437",
        lora_targets=(
            *("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj", "o_proj"),
            *("gate_proj", "up_proj", "down_proj"),
        ),
        tiny={"kv_lora_rank": 12, "q_lora_rank": 20, "v_head_dim": 6}
        | {"num_local_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 2},
        exceptions=FULL_ATTENTION,
    ),
    Architecture(
        "hourglass",
        "ArchHourglass",
        family="hierarchical",
        title="Hourglass",
        paper="arXiv:2110.13711",
        heads=(*DECODER, "ForMaskedLM"),
        lora_targets=(
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            *("shorten_proj", "expand_proj"),
        ),
        tiny={"num_hidden_layers": 3, "num_key_value_heads": 2},
        head_fields={"ForMaskedLM": {"direction": "bidirectional"}},
        exceptions=FULL_ATTENTION,
    ),
    Architecture(
        "megabyte",
        "ArchMegaByte",
        family="hierarchical",
        title="MegaByte",
        paper="arXiv:2305.07185",
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "answer_proj"),
        tiny={"num_key_value_heads": 2, "patch_sizes": [4], "global_hidden_sizes": [64]},
        exceptions=FULL_ATTENTION,
    ),
    Architecture(
        "hnet",
        "ArchHNet",
        family="hierarchical",
        title="H-Net",
        paper="arXiv:2507.07955",
        lora_targets=(
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            *("in_proj", "out_proj", "residual_proj"),
        ),
        tiny={"num_hidden_layers": 3, "inner_hidden_sizes": [48], "state_size": 8, "state_head_dim": 16}
        | {"bos_token_id": 1, "eos_token_id": 2},
        exceptions=FULL_ATTENTION,
    ),
    Architecture(
        "hat",
        "ArchHat",
        family="hierarchical",
        title="HAT",
        paper="arXiv:2210.05529",
        heads=(
            *("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice"),
            *("ForSegmentClassification", "ForPreTraining"),
        ),
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "up_proj", "down_proj", "patch_proj"),
        tiny={"num_hidden_layers": 3, "layer_types": ["level_0", "level_1", "level_0"], "segment_lengths": [16]},
        processor=True,
    ),
    Architecture(
        "hat_encoder_decoder",
        "ArchHatEncoderDecoder",
        family="hierarchical",
        title="HAT encoder-decoder",
        paper="arXiv:1602.06023",
        heads=("Model", "EncoderModel", "ForConditionalGeneration"),
        lora_targets=(
            *("q_proj", "k_proj", "v_proj", "o_proj", "segment_q_proj", "segment_k_proj"),
            *("gate_proj", "up_proj", "down_proj"),
        ),
        tiny={"encoder_num_hidden_layers": 2, "encoder_layer_types": ["level_0", "level_1"]}
        | {"segment_lengths": [8], "num_chosen_segments": 2, "tie_word_embeddings": False},
        head_fields={"EncoderModel": {"is_encoder_decoder": False}},
        exceptions={
            "bounded state": "The decoder sees all of its answer, and chooses from all of the source: its caches "
            "hold both.",
            "bounded step": "And a step reads all of the answer; of the source a vector for each segment, and the "
            "tokens of a few, however long it is.",
            "linear cost": "The decoder compares all pairs of tokens of its answer, and the encoder all pairs of "
            "segments.",
        },
    ),
)


def find(name: str) -> Architecture:
    """The row called `name` (or whose model_type it is); an unknown name is answered with the nearest ones."""
    rows = {row.name: row for row in ARCHITECTURES}
    key = name.lower().replace("-", "_").removeprefix("hf_arch_")
    if key not in rows:
        near = difflib.get_close_matches(key, rows, n=3, cutoff=0.4) or rows
        raise ValueError(
            f"No architecture is called {name!r}. Did you mean {', '.join(near)}? `hf-arch list` shows all."
        )
    return rows[key]
