"""Not in the source distribution: what every config accepts, at values that are not the defaults."""

config_common_kwargs = {
    "architectures": ["ArchModel"],
    "chunk_size_feed_forward": 3,
    "dtype": "float16",
    "id2label": {0: "no", 1: "yes"},
    "label2id": {"no": 0, "yes": 1},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "single_label_classification",
    "return_dict": False,
}
