"""Configs that a row goes through the promises with beside its own, each of which runs other code; and what of a row or
a variant cannot be promised."""

VARIANTS = {
    "transformer": {
        "gpt2": {"position_type": "learned", "norm_type": "layer_norm", "feed_forward_types": ["dense"] * 2}
        | {"hidden_act": "gelu", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        "vaswani": {"position_type": "sinusoidal", "residual_type": "post_norm", "norm_type": "layer_norm"}
        | {"feed_forward_types": ["dense"] * 2, "hidden_act": "relu", "num_key_value_heads": None},
        "deep_norm": {"residual_type": "deep_norm", "norm_type": "layer_norm"},
        "parallel": {"residual_type": "parallel", "num_key_value_heads": 1, "position_type": "xpos"},
        "alibi": {"position_type": "alibi", "num_attention_heads": 6, "head_dim": 8, "num_key_value_heads": 3},
        "t5": {"position_type": "t5", "num_key_value_heads": None},
        "none": {"position_type": "none", "head_dim": 12, "embedding_norm": True},
        "sliding": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9},
        "sliding_alibi": {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9, "position_type": "alibi"},
        "shared": {"num_hidden_groups": 1, "num_hidden_layers": 3, "hidden_act": "gelu"},
        "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        "prefix": {"direction": "prefix"},
        "sparse": {"feed_forward_types": ["gated", "sparse"], "num_local_experts": 4, "moe_intermediate_size": 24},
    },
    "performer": {
        "relu": {"kernel_type": "relu", "position_type": "learned", "num_key_value_heads": None}
        | {"norm_type": "layer_norm", "attention_bias": True},
    },
    "retnet": {
        "hierarchical": {"feed_forward_types": ["hierarchical"] * 2, "num_local_experts": 4, "num_expert_groups": 2}
    },
    "hybrid": {
        "jamba": {"layer_types": ["ssd", "full_attention"], "feed_forward_types": ["gated", "sparse"]}
        | {"position_type": "none", "num_local_experts": 4, "mixer_options": {"ssd": {"state_size": 8}}},
        "attention_first": {"layer_types": ["full_attention", "sink_attention"], "mixer_options": None},
    },
    "h3": {
        "hybrid": {"layer_types": ["h3", "full_attention"], "state_head_dim": 1, "state_size": 20},
        "gated": {"feed_forward_types": ["gated", "sparse"], "num_local_experts": 4, "mlp_bias": False}
        | {"discretization": "zoh", "initialization": "real"},
    },
    "s4": {
        "bilinear": {"layer_types": ["s4d"] * 2, "discretization": "bilinear", "initialization": "inv"},
        "legs": {"layer_types": ["s4"] * 2, "feed_forward_types": ["dense", "none"], "hidden_act": "gelu"},
        "s4d_legs": {"layer_types": ["s4d"] * 2, "initialization": "legs", "feed_forward_types": ["sparse", "none"]}
        | {"num_local_experts": 4},
        "real": {"layer_types": ["s4d"] * 2, "initialization": "real"},
    },
    "hyena": {
        "third_order": {"hyena_order": 3, "short_filter_order": 4, "attention_bias": False},
        "modal": {"layer_types": ["modal_hyena"] * 2, "state_size": 5, "hyena_order": 3},
        "mixed": {"layer_types": ["modal_hyena", "hyena"], "state_size": 3},
    },
    "transformer_xl": {
        "same_length": {"same_length": True, "memory_length": 9, "clamp_length": 7, "num_attention_heads": 2}
        | {"untie_biases": False, "head_dim": 12},
        "adaptive": {
            "cutoffs": [20, 50],
            "div_val": 2,
            "tie_word_embeddings": True,
            "tie_projections": [False, True, True],
        },
        "pre_norm": {
            "residual_type": "pre_norm",
            "embedding_size": 24,
            "cutoffs": [20, 50],
            "segment_length": 24,
            "memory_length": 7,
        }
        | {"feed_forward_types": ["gated", "sparse"], "num_local_experts": 4, "mlp_bias": False},
    },
    "routing_transformer": {
        "turned": {"num_local_heads": [0, 4], "routed_norm": "unit", "rotary_routed": True, "attention_bias": True}
        | {"feed_forward_types": ["gated", "sparse"], "num_local_experts": 4},
    },
    "compressive_transformer": {
        "most_used": {"compression": "most_used", "memory_length": 16, "compressed_memory_length": 6}
        | {"compression_rate": 2},
        "dilated": {"compression": "dilated_convolution", "residual_type": "pre_norm", "num_attention_heads": 2},
    },
    "longformer": {
        "wide": {"attention_window": 200},
        "layers": {"attention_window": [8, 12], "attention_dilation": [1, 2]},
        "questions": {"attention_window": 6, "attention_dilation": 3, "num_global_tokens": 5},
    },
    "sparse_transformer": {
        "factorized": {"layer_types": ["strided_attention", "fixed_attention"], "num_key_value_heads": 2},
        "dilated": {"layer_types": ["dilated_attention"] * 2, "position_type": "rope"},
        "streaming": {"layer_types": ["sink_attention"] * 2, "position_type": "rope", "num_key_value_heads": 2},
        "retrieval": {"layer_types": ["retrieval_attention"] * 2, "position_type": "rope", "num_key_value_heads": 2}
        | {"retrieval_block_size": 4, "retrieved_blocks": 3},
    },
    "reformer": {
        "local": {"layer_types": ["local_attention"] * 2, "position_type": "sinusoidal", "local_attn_chunk_length": 5},
        "lsh": {"layer_types": ["lsh_attention"] * 2, "position_type": "learned", "head_dim": 6, "num_buckets": 6}
        | {"feed_forward_types": ["gated"] * 2, "attention_bias": True, "num_hashes": 1, "lsh_attn_chunk_length": 70},
    },
    "bigbird": {
        "no_global_block": {"block_size": 16, "num_window_blocks": 1, "num_random_blocks": 3, "num_global_blocks": 0},
    },
    "deepseek": {
        "v2": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
        | {"q_lora_rank": None, "norm_topk_prob": False, "v_head_dim": 20, "kv_lora_rank": 5}
        | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale_all_dim": 0.7}},
        "further": {"num_nextn_predict_layers": 2, "n_shared_experts": 0, "attention_bias": True},
    },
    "mixtral": {"sliding": {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9}},
    "mixture_of_depths": {
        "everywhere": {"layer_types": ["routed_attention"] * 2, "num_key_value_heads": None}
        | {"feed_forward_types": ["gated", "sparse"], "num_local_experts": 4},
        "early_exit": {
            "layer_types": ["early_exit_attention"] * 3,
            "num_hidden_layers": 3,
            "early_exit_threshold": 0.5,
        },
    },
    "hourglass": {
        "nested": {"shorten_factors": [2, 3], "num_hidden_layers": 5, "resampling_type": "average"}
        | {"layer_types": ["causal_window_attention", *["ragged_attention"] * 3, "causal_window_attention"]}
        | {"sliding_window": 9, "position_type": "learned", "attention_bias": True},
        "plain": {"shorten_factors": [4], "layer_levels": [1, 1, 0], "attention_resampling": False}
        | {"feed_forward_types": ["gated", "sparse", "dense"], "num_local_experts": 4, "norm_type": "rms_norm"}
        | {"mlp_bias": False},
    },
    "megabyte": {
        "three_levels": {"patch_sizes": [4, 3], "global_hidden_sizes": [16, 48], "num_hidden_layers": 4}
        | {"layer_levels": [2, 1, 0, 0], "position_type": "learned", "attention_bias": True}
        | {"feed_forward_types": ["gated", "dense", "sparse", "dense"], "num_local_experts": 4},
    },
    "hnet": {
        "two_stages": {"inner_hidden_sizes": [32, 48], "num_hidden_layers": 7, "layer_levels": [0, 1, 1, 2, 1, 1, 0]}
        | {
            "layer_types": ["ssd", "causal_window_attention", "ssd", "ragged_attention"]
            + ["ssd", "causal_window_attention", "ssd"],
            "sliding_window": 9,
            "num_key_value_heads": 2,
        }
        | {"feed_forward_types": ["none", "gated", "none", "gated", "none", "sparse", "none"], "num_local_experts": 4},
    },
    "hat": {
        "one_level": {"segment_lengths": [], "layer_types": ["level_0"] * 3},
        "three_levels": {"segment_lengths": [5, 4], "num_hidden_layers": 5}
        | {"layer_types": ["level_0", "level_1", "level_2", "level_1", "level_0"]},
        "top_down": {"segment_lengths": [5, 4], "num_hidden_layers": 7, "shared_levels": True}
        | {"layer_types": ["level_0", "level_1", "level_0", "level_2", "down_1", "down_2", "pool_1"]},
        "han": {"layer_types": ["gru_0", "pool_0", "gru_1", "pool_1", "gru_0"], "num_hidden_layers": 5}
        | {"feed_forward_types": ["none"] * 5, "position_type": "none", "residual_type": "replaced"}
        | {"embedding_norm": False, "document_pooling": "leader"},
    },
    "encoder_decoder": {
        "vaswani": {"position_type": "sinusoidal", "residual_type": "post_norm", "norm_type": "layer_norm"}
        | {"feed_forward_types": ["dense"] * 2, "hidden_act": "relu", "attention_bias": True, "mlp_bias": True},
        "deep_norm": {"residual_type": "deep_norm", "norm_type": "layer_norm", "tie_word_embeddings": True},
        "parallel": {"residual_type": "parallel", "position_type": "alibi", "num_key_value_heads": 2},
        "sliding": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9}
        | {"position_type": "rope", "attention_scaling": None},
        "shared": {"num_hidden_groups": 1, "position_type": "learned", "scale_logits": True},
    },
}


# Parameters that a head's loss does not rest on, by row and head: their gradient is there, and zero
LAST_WINDOW = (
    r"model\.layers\.1\.mixer\.[qkv]_proj\..*"  # the token that speaks for the text is global, and sees past it
)
COMPRESSION = r"(model\.)?layers\.\d\.mixer\.compression\..*"  # it learns by a loss of its own, beside that of tokens
PREDICTOR = r"(model\.)?layers\.\d\.view\.predictor\..*"  # and so does it
WITHOUT_TOKENS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
IDLE = {
    "longformer": dict.fromkeys(("ForSequenceClassification", "ForMultipleChoice"), LAST_WINDOW),
    "compressive_transformer": dict.fromkeys(WITHOUT_TOKENS, COMPRESSION),
    "mixture_of_depths": {"Model": PREDICTOR},
}

WINDOWS = {"padding does not enter the state": "transformers' cache of a window counts columns, padding included."}
EXCEPTIONS = {"sliding": WINDOWS, "sliding_alibi": WINDOWS}
