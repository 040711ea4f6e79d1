"""LoRA for every architecture: default targets for PEFT, and a configuration that also reaches stacked experts."""

import torch
from peft import LoraConfig
from peft.utils import constants
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_arch.architecture import Architecture
from hf_arch.catalogue import ARCHITECTURES, find

ROUTERS = ("gate", "group_gate")  # of sparse feed-forwards, which any architecture may have
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def register_targets() -> None:
    """Tell PEFT which modules its methods adapt by default, so that no `target_modules` need be given."""
    named = {name: mapping for name, mapping in vars(constants).items() if name.endswith("_MODULES_MAPPING")}
    projecting = [mapping for mapping in named.values() if mapping.get("llama") == ["q_proj", "v_proj"]]  # LoRA's kin
    for row in ARCHITECTURES:
        for mapping in projecting:
            mapping.setdefault(row.model_type, targets(row))
        scaled = ["k_proj", "v_proj", "down_proj"] if "v_proj" in row.lora_targets else list(row.lora_targets)
        constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.setdefault(row.model_type, scaled)
        constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.setdefault(row.model_type, ["down_proj"])


def targets(row: Architecture) -> list[str]:
    """The modules that adapters reach by default: those of the row, and routers."""
    return [*row.lora_targets, *ROUTERS]


def lora_config(model_or_config: PreTrainedModel | PreTrainedConfig, **overrides) -> LoraConfig:
    """A `peft.LoraConfig` with the architecture's default targets, its stacked expert weights and the slots of soft
    mixtures, and the head's task.

    `overrides` are fields of LoraConfig (`r`, `lora_alpha`, `target_modules`, ...). Raises ValueError for a model that
    is not of hf_arch, and for dropout on experts. Example: `get_peft_model(model, hf_arch.lora_config(model, r=16))`.
    """
    config = getattr(model_or_config, "config", model_or_config)
    row = find(config.model_type)
    model = model_or_config
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            model = row.load(narrowest_head(row, config))(config)
    fields = {"target_modules": targets(row), "target_parameters": bare_matrices(model) or None}
    if overrides.get("lora_dropout") and (fields | overrides)["target_parameters"]:
        raise ValueError(
            "Adapters of stacked experts take no dropout: leave lora_dropout at 0, or the experts as they are with "
            "target_parameters=None."
        )
    fields["task_type"] = TASKS.get(type(model_or_config).__name__.removeprefix(row.prefix))
    return LoraConfig(**(fields | overrides))


def narrowest_head(row: Architecture, config: PreTrainedConfig) -> str:
    """Of the heads that a config can have, the one that asks the most of it: the config may be of a stack alone."""

    def asked(head: str) -> dict:
        return row.head_fields.get(head, {})

    fitting = [head for head in row.heads if all(getattr(config, name) == is_ for name, is_ in asked(head).items())]
    return max(fitting or row.heads, key=lambda head: len(asked(head)))


def bare_matrices(model: nn.Module) -> list[str]:
    """The ends of the names of matrices of sparse feed-forwards that are no module's of their own: one per expert,
    [experts, out, in], and the slots of a soft mixture."""
    names = (
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and ".experts." in name or name.endswith("router.phi")
    )
    return list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))
