"""What is not run, or only by `make conformance-full`: the one place where we say so. Patterns are of test names."""

from fnmatch import fnmatch

from hf_arch import ARCHITECTURES

# Tests that cannot apply to any model of ours, beside those that skip themselves and say rightly why
NOT_APPLICABLE: dict[str, str] = {
    "test_sdpa_can_dispatch_composite_models": "No model of ours is composite",
    "test_model_rope_scaling_frequencies": (
        "Looks for a module called rotary_emb that answers (cos, sin); tests/test_positions.py compares ours"
    ),
}

# Rows that write text, whose tiny config has no experts
DENSE = [row.name for row in ARCHITECTURES if "ForCausalLM" in row.heads and "num_local_experts" not in row.tiny]

WEIGHTS_OF_BLOCKS = "The weights that are recorded are copies of those of blocks"
ANSWERS_TESTED = "Our stand-in of the generation tests is for decoders; tests/test_seq2seq.py holds answers to the same"

# (row, test): what the mathematics of a row cannot keep
NOT_KEPT: dict[tuple[str, str], str] = {
    (row, "test_output_router_logits_from_config"): "No feed-forward is sparse: there are no routers to ask"
    for row in DENSE
} | {
    ("hat", "test_output_router_logits_from_config"): "No feed-forward is sparse: there are no routers to ask",
    ("hat", "test_num_layers_is_small"): "Three layers: inside segments, across, and inside again, to see all",
    ("hnet", "test_model_rope_scaling_from_config_1_dynamic"): (
        "Positions count chunks: a text half as long again as the limit has fewer, so that nothing is scaled"
    ),
    ("hnet", "test_num_layers_is_small"): "Three layers: before chunks, on them, and after",
    ("hnet", "test_greedy_generate_dict_outputs"): "Hidden states of layers on chunks are as many as chunks",
    ("hourglass", "test_num_layers_is_small"): "Three layers: before the shortening, on groups, and after",
    ("hourglass", "test_greedy_generate_dict_outputs"): "Hidden states of layers on groups are as many as groups",
    ("megabyte", "test_hidden_states_output"): "The first layers are of patches: fewer items, and wider",
    ("megabyte", "test_greedy_generate_dict_outputs"): "Hidden states of the global model are as many as patches",
    ("retnet", "test_model_rope_scaling_from_config*"): "RetNet scales no rotations: its config refuses to",
    ("routing_transformer", "test_model_rope_scaling_from_config*"): "Scales no rotations: its config refuses to",
    ("longformer", "test_model_rope_scaling_from_config*"): "Longformer's positions are a table: nothing is rotated",
    ("sparse_transformer", "test_model_rope_scaling_from_config*"): "GPT-3's positions are a table: nothing is rotated",
    ("reformer", "test_model_rope_scaling_from_config*"): "Reformer's positions are a grid: nothing is rotated",
    ("bigbird", "test_model_rope_scaling_from_config*"): "BigBird's positions are a table: nothing is rotated",
    ("bigbird", "test_retain_grad_hidden_states_attentions"): WEIGHTS_OF_BLOCKS,
    ("longformer", "test_retain_grad_hidden_states_attentions"): WEIGHTS_OF_BLOCKS,
    ("longformer", "test_greedy_generate_dict_outputs"): "A step sees its window: there are no weights of all",
    ("reformer", "test_greedy_generate_dict_outputs"): "A step sees blocks of its buckets: there are no weights of all",
    ("mixture_of_depths", "test_greedy_generate_dict_outputs"): "Weights of a routed layer are of its own tokens",
    ("mixture_of_depths", "test_training_overfit"): (
        "Its loss falls and its text is right; but where the router's choice turns, the predictor's gradient grows"
    ),
}

# Of encoder-decoders with T5's positions
NOT_KEPT |= {
    (row, test): reason
    for row in ("encoder_decoder", "switch")
    for test, reason in {
        "test_model_rope_scaling_from_config*": "T5's bias tells positions: nothing is rotated",
        "test_retain_grad_hidden_states_attentions": (
            "A bias by distance takes the last query first: the weights that are recorded are a copy in order"
        ),
        "test_load_with_mismatched_shapes": "AutoModel is both stacks, which a config of one stack alone refuses",
        "test_generation_tester_mixin_inheritance": ANSWERS_TESTED,
    }.items()
} | {
    ("hat_encoder_decoder", "test_generation_tester_mixin_inheritance"): ANSWERS_TESTED,
    ("hat_encoder_decoder", "test_model_rope_scaling_from_config*"): (
        "The source of the test is longer than the encoder has places for; only the decoder's positions are rotations"
    ),
    ("hat_encoder_decoder", "test_retain_grad_hidden_states_attentions"): (
        "The weights that are recorded are those of the definition, made beside the answer of the fast form"
    ),
}

# Seconds of processor time each, or many of a kind
SLOW = (
    "test_eager_matches_sdpa_inference_*_fp16_*",
    "test_eager_matches_sdpa_inference_*_bf16_*",
    "test_eager_matches_sdpa_inference_*_sdpa_kernels",
    "test_bc_torch_dtype",
    "test_training_overfit",
    "test_generate_compile_model_forward_fullgraph",
    "test_tp_forward*",
    "test_tp_backward*",
    "test_tp_generation*",
    "test_ep_forward*",
    "test_ep_backward*",
    "test_fsdp2_*",
    "test_hsdp_*",
)


def is_slow(test: str) -> bool:
    return any(fnmatch(test, pattern) for pattern in SLOW)


def reason_to_skip(row: str, test: str) -> str | None:
    reasons = [reason for pattern, reason in NOT_APPLICABLE.items() if fnmatch(test, pattern)]
    reasons += [reason for (name, pattern), reason in NOT_KEPT.items() if name == row and fnmatch(test, pattern)]
    return reasons[0] if reasons else None
