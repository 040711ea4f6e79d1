"""How large a model is, and what a token costs it, computed from its config alone: on torch's meta device."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, DynamicCache, PreTrainedConfig, PreTrainedModel

from hf_arch.bench import costs_of_hierarchies, costs_of_long_context, costs_of_recurrences  # noqa: F401, they register
from hf_arch.bench.costs import Span, cost
from hf_arch.catalogue import find
from hf_arch.modeling.layers.chosen_cache import ChosenCacheLayer
from hf_arch.modeling.layers.experts import SeparateExperts, SideBySide
from hf_arch.states import state_bytes

CONTEXT = 8192
LLAMA_3_1 = {"vocab_size": 128256, "max_position_embeddings": 131072, "num_key_value_heads": 8}
# The configs of released checkpoints, by what people call them: a row, and fields of its config
RELEASED = {
    "Llama 3.1 8B": (
        "transformer",
        LLAMA_3_1
        | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "Llama 3.1 405B": (
        "transformer",
        LLAMA_3_1
        | {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
    ),
    "DeepSeek-V3": (
        "deepseek",
        {"vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61}
        | {"num_attention_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128}
        | {"qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 3, "moe_intermediate_size": 2048}
        | {"num_local_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 8, "topk_group": 4}
        | {"routed_scaling_factor": 2.5, "max_position_embeddings": 163840},
    ),
}


@dataclass(frozen=True)
class Description:
    """Numbers of one model.

    parameters: all of them. active: those that the products for one token use; of the experts its own, of the input
        embeddings, which are looked up, none.
    cache_bytes: what the cache holds after a text of `context` tokens, in bfloat16; None where it rests on the text, of
        which layers keep what they choose.
    read_operations: of matrix products (a multiply-add as two) for a token of a text of `context` tokens, the mean.
    step_operations: the same for one token after such a text.
    """

    parameters: int
    active: int
    cache_bytes: int | None
    read_operations: float
    step_operations: float
    context: int


def describe(model_or_config: PreTrainedModel | PreTrainedConfig, context: int = CONTEXT) -> Description:
    """The numbers of a causal language model of hf_arch, or of the one that a config of hf_arch is of.

    Nothing is computed with weights: a config of any size will do. Raises ValueError for what is not of hf_arch, or
    names no next token.
    """
    config = copy.deepcopy(getattr(model_or_config, "config", model_or_config))
    row = find(config.model_type)
    if "ForCausalLM" not in row.heads:
        raise ValueError(f"{row.name} names no next token: only decoders are described.")
    with torch.device("meta"):
        model = row.load("ForCausalLM")(config).to(torch.bfloat16).eval()
    return Description(
        parameters=model.num_parameters(),
        active=active_parameters(model),
        cache_bytes=held_bytes(model, context),
        read_operations=cost(model, Span(context)).operations / context,
        step_operations=cost(model, Span(1, before=context)).operations,
        context=context,
    )


def active_parameters(model: PreTrainedModel) -> int:
    """Those that the products for one token use."""
    looked_up = model.get_input_embeddings().weight
    tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is looked_up
    count = model.num_parameters() - (0 if tied else looked_up.numel())
    for module in model.modules():
        if isinstance(module, SideBySide | SeparateExperts):
            of_all = sum(weight.numel() for weight in module.parameters())
            count -= of_all - of_all // module.num_experts * model.config.num_experts_per_tok
    return count


@torch.no_grad()
def held_bytes(model: PreTrainedModel, length: int) -> int | None:
    """What the cache holds after a text."""
    cache = DynamicCache(config=model.config)
    if any(isinstance(layer, ChosenCacheLayer) for layer in cache.layers):
        return None
    model(torch.zeros(1, length, dtype=torch.long, device="meta"), past_key_values=cache, logits_to_keep=1)
    return state_bytes(cache)


def of_cache(described: Description) -> str:
    held = described.cache_bytes
    return "by the text" if held is None else f"{held / described.context / 1024:.1f} KiB"


def side_by_side(described: Iterable[tuple[str, Description]]) -> str:
    """A table in Markdown: a column for each model."""
    described = list(described)
    context = described[0][1].context
    lines = {
        "parameters": lambda d: f"{d.parameters / 1e9:.2f} B",
        "active for a token": lambda d: f"{d.active / 1e9:.2f} B",
        "cache for a token, bfloat16": of_cache,
        f"reading a text of {context} tokens, each": lambda d: f"{d.read_operations / 1e9:.0f} GFLOP",
        f"naming a token after {context}": lambda d: f"{d.step_operations / 1e9:.0f} GFLOP",
    }
    table = [("", *(name for name, _ in described)), ("---", *("--:" for _ in described))]
    table += [(title, *(number(each) for _, each in described)) for title, number in lines.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def beside_released(models: Iterable[str] = (), context: int = CONTEXT) -> str:
    """The table of `RELEASED`, and of models whose config.json a folder or a repository of the Hub holds."""
    configs = {name: find(row).load("Config")(**fields) for name, (row, fields) in RELEASED.items()}
    configs |= {Path(name).name: AutoConfig.from_pretrained(name) for name in models}
    return side_by_side((name, describe(config, context)) for name, config in configs.items())
