"""LoRA for every architecture: default targets for PEFT, and a configuration that also reaches stacked experts."""

import torch
from peft import LoraConfig
from peft.utils import constants
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_arch.catalogue import ARCHITECTURES, find

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def register_targets() -> None:
    """Tell PEFT which modules its methods adapt by default, so that no `target_modules` need be given."""
    for row in ARCHITECTURES:
        for name, mapping in vars(constants).items():
            if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_TARGET_MODULES_MAPPING"):
                if "IA3" not in name and mapping.get("llama") == ["q_proj", "v_proj"]:  # adapts projections, as LoRA
                    mapping.setdefault(row.model_type, list(row.lora_targets))


def lora_config(model_or_config: PreTrainedModel | PreTrainedConfig, **overrides) -> LoraConfig:
    """A `peft.LoraConfig` with the architecture's default targets, its stacked expert weights, and the task of the head.

    `overrides` are fields of LoraConfig (`r`, `lora_alpha`, `target_modules`, ...). Raises ValueError for a model that
    is not of hf_arch. Example: `get_peft_model(model, hf_arch.lora_config(model, r=16))`.
    """
    config = getattr(model_or_config, "config", model_or_config)
    row = find(config.model_type)
    head = type(model_or_config).__name__.removeprefix(row.prefix)
    fields = {"target_modules": list(row.lora_targets), "task_type": TASKS.get(head)}
    if stacked := stacked_experts(
        model_or_config if isinstance(model_or_config, nn.Module) else skeleton_of(row, config)
    ):
        fields["target_parameters"] = stacked
    return LoraConfig(**(fields | overrides))


def skeleton_of(row, config: PreTrainedConfig) -> nn.Module:
    """The model without its weights."""
    with torch.device("meta"):
        return row.load("Model")(config)


def stacked_experts(model: nn.Module) -> list[str]:
    """The ends of the names of parameters that hold one matrix per expert, [experts, out, in]."""
    names = (name for name, parameter in model.named_parameters() if parameter.ndim == 3 and ".experts." in name)
    return list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))
