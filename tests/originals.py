"""Tiny originals of transformers, and their checkpoints in every layout that is found on the Hub."""

import json

import torch
import transformers
from safetensors.torch import load_file, save_file

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA = SIZES | {"intermediate_size": 40, "num_key_value_heads": 2, "pad_token_id": 0}
BERT = SIZES | {"intermediate_size": 40, "num_labels": 5}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
GPT2 |= {"eos_token_id": 2, "pad_token_id": 0}
SCALED = {"factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0}
LLAMA3 = SCALED | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = SCALED | {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}

PEERS = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama without groups, with biases": (
        "LlamaForCausalLM",
        LLAMA | {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    ),
    "llama tied, with wide heads": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True, "head_dim": 12}),
    "llama 3.1": ("LlamaForCausalLM", LLAMA | {"rope_parameters": LLAMA3}),
    "llama linear": ("LlamaForCausalLM", LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama dynamic": (
        "LlamaForCausalLM",
        LLAMA | {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16},
    ),
    "llama yarn": ("LlamaForCausalLM", LLAMA | {"rope_parameters": SCALED | {"rope_type": "yarn"}}),
    "llama longrope": ("LlamaForCausalLM", LLAMA | {"rope_parameters": LONGROPE}),
    "llama base": ("LlamaModel", LLAMA),
    "llama sequence": ("LlamaForSequenceClassification", LLAMA | {"num_labels": 5}),
    "llama tokens": ("LlamaForTokenClassification", LLAMA | {"num_labels": 5}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2 base": ("GPT2Model", GPT2 | {"n_inner": 48}),
    "gpt2 untied": ("GPT2LMHeadModel", GPT2 | {"tie_word_embeddings": False, "activation_function": "relu"}),
    "gpt2 sequence": ("GPT2ForSequenceClassification", GPT2 | {"num_labels": 5}),
    "gpt2 tokens": ("GPT2ForTokenClassification", GPT2 | {"num_labels": 5}),
    "bert": ("BertForMaskedLM", BERT),
    "bert base": ("BertModel", BERT),
    "bert pretraining": ("BertForPreTraining", BERT),
    "bert sequence": ("BertForSequenceClassification", BERT),
    "bert tokens": ("BertForTokenClassification", BERT),
    "bert questions": ("BertForQuestionAnswering", BERT | {"num_labels": 2}),
}


def scaled_up(model):
    """Weights that no initialisation gives: attention looks at few tokens, and no norm or bias is the identity."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = parameter.ndim == 1 and name.endswith("weight")
        parameter.data = 1 + 0.2 * noise if is_scale else 0.3 * noise if parameter.ndim > 1 else 0.2 * noise
    return model.eval()


def original(name, **more):
    kind, fields = PEERS[name]
    peer_class = getattr(transformers, kind)
    return scaled_up(peer_class(peer_class.config_class(**fields | more)))


def hub_names(tensors, model_type):
    """The names that the first checkpoints on the Hub have, with the buffers of their time."""
    if model_type == "gpt2":
        tensors = {key.removeprefix("transformer."): x for key, x in tensors.items()}
        mask = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)}
        return tensors | mask | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    if model_type == "llama":
        return tensors | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    ends = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    for new, old in ends:
        tensors = {key.replace(new, old): x for key, x in tensors.items()}
    return tensors | {"bert.embeddings.position_ids": torch.arange(64)[None]}


def rewrite(folder, style, model_type):
    """Another layout of what save_pretrained wrote into `folder`."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors = hub_names(tensors, model_type)
    if style == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    shards = {f"model-0000{i + 1}-of-00003.safetensors": list(tensors)[i::3] for i in range(3)}
    for shard, names in shards.items():
        save_file({name: tensors[name].contiguous() for name in names}, folder / shard)
    where = {name: shard for shard, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@torch.no_grad()
def largest_difference(ours, original, length=40):
    """In float64, of the answers to random tokens."""
    ids = torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(1))
    answer, expected = ours.double()(ids)[0], original.double()(ids)[0]
    assert answer.dtype == expected.dtype == torch.float64 and expected.std() > 0.1
    return (answer - expected).abs().max()
