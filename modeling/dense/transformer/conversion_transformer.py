"""Llama, GPT-2 and BERT are Transformers: their checkpoints, in the layout of transformers and of the Hub."""

import copy
import re

import torch
from transformers import BertConfig, GPT2Config, LlamaConfig

from ...skeleton.conversion import Conversion, Fields, Rule, Tensors, require

SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "initializer_range",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "id2label",
    "label2id",
    "problem_type",
)


def same_fields(config, *more: str) -> Fields:
    return {name: copy.deepcopy(getattr(config, name)) for name in (*SAME, *more)}


def transposed(tensor: torch.Tensor, config) -> torch.Tensor:
    """GPT-2 keeps its matrices [in, out]."""
    return tensor.T


def split_query_key_value(tensor: torch.Tensor, config) -> tuple[torch.Tensor, ...]:
    """[in, 3 * size] or [3 * size] -> three of [size, in] or [size]."""
    return tuple(piece.T if piece.ndim == 2 else piece for piece in tensor.chunk(3, dim=-1))


def score_without_bias(tensors: Tensors, fields: Fields) -> Tensors:
    """Llama and GPT-2 score sequences without the bias that our head has."""
    if "score.weight" in tensors and "score.bias" not in tensors:
        tensors = tensors | {"score.bias": tensors["score.weight"].new_zeros(len(tensors["score.weight"]))}
    return tensors


def weights_and_biases(tensors: Tensors, fields: Fields) -> Tensors:
    """The first BERT checkpoints call those of a norm gamma and beta."""
    ends = {"gamma": "weight", "beta": "bias"}
    return {re.sub(r"(?<=LayerNorm\.)(gamma|beta)$", lambda m: ends[m[1]], key): x for key, x in tensors.items()}


def llama_config(fields: Fields) -> Fields:
    config = LlamaConfig.from_dict(fields)
    more = ("intermediate_size", "num_key_value_heads", "head_dim", "hidden_act", "rope_parameters")
    more += ("attention_bias", "mlp_bias", "attention_dropout")
    return same_fields(config, *more) | {"norm_eps": config.rms_norm_eps}


def gpt2_config(fields: Fields) -> Fields:
    require(fields, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    config = GPT2Config.from_dict(fields)
    return same_fields(config) | {
        "intermediate_size": config.n_inner or 4 * config.n_embd,
        "feed_forward_types": ["dense"] * config.n_layer,
        "hidden_act": config.activation_function,
        "norm_type": "layer_norm",
        "norm_eps": config.layer_norm_epsilon,
        "position_type": "learned",
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_dropout": config.resid_pdrop,
        "attention_dropout": config.attn_pdrop,
    }


def bert_config(fields: Fields, original: type = BertConfig) -> Fields:
    require(fields, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    config = original.from_dict(fields)
    return same_fields(config, "intermediate_size", "hidden_act", "type_vocab_size") | {
        "direction": "bidirectional",
        "residual_type": "post_norm",
        "feed_forward_types": ["dense"] * config.num_hidden_layers,
        "norm_type": "layer_norm",
        "norm_eps": config.layer_norm_eps,
        "embedding_norm": True,
        "position_type": "learned",
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_dropout": config.hidden_dropout_prob,
        "attention_dropout": config.attention_probs_dropout_prob,
    }


BERT_LAYER = (  # what is in its layers, and in ours; the first group of a rule is the number of the layer
    (r"attention\.self\.([qkv])(?:uery|ey|alue)\.(\w+)", r"mixer.\2_proj.\3"),
    (r"attention\.output\.dense\.(\w+)", r"mixer.o_proj.\2"),
    (r"attention\.output\.LayerNorm\.(\w+)", r"residual.norm.mixer.\2"),
    (r"intermediate\.dense\.(\w+)", r"feed_forward.up_proj.\2"),
    (r"output\.dense\.(\w+)", r"feed_forward.down_proj.\2"),
    (r"output\.LayerNorm\.(\w+)", r"residual.norm.feed_forward.\2"),
)

LLAMA = Conversion(
    model_type="llama",
    config=llama_config,
    heads={
        "LlamaForCausalLM": "ForCausalLM",
        "LlamaModel": "Model",
        "LlamaForSequenceClassification": "ForSequenceClassification",
        "LlamaForTokenClassification": "ForTokenClassification",
        "LlamaForQuestionAnswering": "ForQuestionAnswering",
    },
    default_head="ForCausalLM",
    prepare=score_without_bias,
    rules=(
        Rule(r".*rotary_emb\.inv_freq"),
        Rule(r"(?:(?:model|transformer)\.)?(embed_tokens|norm)\.weight", r"model.\1.weight"),
        *(
            Rule(rf"(?:(?:model|transformer)\.)?layers\.(\d+)\.{theirs}", rf"model.layers.\1.{ours}")
            for theirs, ours in (
                (r"self_attn\.(\w_proj\.(?:weight|bias))", r"mixer.\2"),
                (r"mlp\.(\w+_proj\.(?:weight|bias))", r"feed_forward.\2"),
                (r"input_layernorm\.weight", "residual.norm.mixer.weight"),
                (r"post_attention_layernorm\.weight", "residual.norm.feed_forward.weight"),
            )
        ),
        Rule(r"(lm_head\.weight|score\.\w+|qa_outputs\.\w+)", r"\1"),
    ),
)

GPT2 = Conversion(
    model_type="gpt2",
    config=gpt2_config,
    heads={
        "GPT2LMHeadModel": "ForCausalLM",
        "GPT2Model": "Model",
        "GPT2ForSequenceClassification": "ForSequenceClassification",
        "GPT2ForTokenClassification": "ForTokenClassification",
        "GPT2ForQuestionAnswering": "ForQuestionAnswering",
    },
    default_head="ForCausalLM",
    prepare=score_without_bias,
    rules=(
        Rule(r"(?:transformer\.)?wte\.weight", "model.embed_tokens.weight"),
        Rule(r"(?:transformer\.)?wpe\.weight", "model.embed_positions.embed_positions.weight"),
        Rule(r"(?:transformer\.)?ln_f\.(\w+)", r"model.norm.\1"),
        Rule(
            r"(?:transformer\.)?h\.(\d+)\.attn\.c_attn\.(\w+)",
            *(rf"model.layers.\1.mixer.{name}_proj.\2" for name in "qkv"),
            change=split_query_key_value,
        ),
        *(
            Rule(
                rf"(?:transformer\.)?h\.(\d+)\.{theirs}", *(rf"model.layers.\1.{ours}" for ours in ours), change=change
            )
            for theirs, ours, change in (
                (r"attn\.(?:bias|masked_bias)", (), None),  # the causal mask
                (r"attn\.c_proj\.weight", ("mixer.o_proj.weight",), transposed),
                (r"attn\.c_proj\.bias", ("mixer.o_proj.bias",), None),
                (r"mlp\.c_fc\.weight", ("feed_forward.up_proj.weight",), transposed),
                (r"mlp\.c_fc\.bias", ("feed_forward.up_proj.bias",), None),
                (r"mlp\.c_proj\.weight", ("feed_forward.down_proj.weight",), transposed),
                (r"mlp\.c_proj\.bias", ("feed_forward.down_proj.bias",), None),
                (r"ln_1\.(\w+)", (r"residual.norm.mixer.\2",), None),
                (r"ln_2\.(\w+)", (r"residual.norm.feed_forward.\2",), None),
            )
        ),
        Rule(r"(lm_head\.weight|score\.\w+|qa_outputs\.\w+)", r"\1"),
        Rule(r"classifier\.(\w+)", r"score.\1"),
    ),
)

BERT = Conversion(
    model_type="bert",
    config=bert_config,
    heads={
        "BertForMaskedLM": "ForMaskedLM",
        "BertForPreTraining": "ForMaskedLM",
        "BertModel": "Model",
        "BertForSequenceClassification": "ForSequenceClassification",
        "BertForTokenClassification": "ForTokenClassification",
        "BertForQuestionAnswering": "ForQuestionAnswering",
    },
    default_head="ForMaskedLM",
    prepare=weights_and_biases,
    rules=(
        *(
            Rule(rf"(?:bert\.)?embeddings\.{theirs}", *ours)
            for theirs, ours in (
                (r"position_ids", ()),
                (r"word_embeddings\.weight", ("model.embed_tokens.weight",)),
                (r"position_embeddings\.weight", ("model.embed_positions.embed_positions.weight",)),
                (r"token_type_embeddings\.weight", ("model.embed_segments.weight",)),
                (r"LayerNorm\.(\w+)", (r"model.embed_norm.\1",)),
            )
        ),
        *(
            Rule(rf"(?:bert\.)?encoder\.layer\.(\d+)\.{theirs}", rf"model.layers.\1.{ours}")
            for theirs, ours in BERT_LAYER
        ),
        Rule(r"(?:bert\.)?pooler\.dense\.(\w+)", r"pooler.dense.\1"),
        Rule(r"cls\.seq_relationship\.\w+"),
        Rule(r"cls\.predictions\.transform\.dense\.(\w+)", r"lm_head.dense.\1"),
        Rule(r"cls\.predictions\.transform\.LayerNorm\.(\w+)", r"lm_head.norm.\1"),
        Rule(r"cls\.predictions\.(?:decoder\.)?(weight|bias)", r"lm_head.decoder.\1"),
        Rule(r"classifier\.(\w+)", r"score.\1"),
        Rule(r"(qa_outputs\.\w+)", r"\1"),
    ),
)

CONVERSIONS = (LLAMA, GPT2, BERT)
