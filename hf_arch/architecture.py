"""What the catalogue says of an architecture."""

import importlib
from dataclasses import dataclass, field

AUTO_CLASSES = {
    "Model": "AutoModel",
    "EncoderModel": "AutoModelForTextEncoding",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForSegmentClassification": "AutoModelForNextSentencePrediction",  # the one that transformers has for sentences
    "ForPreTraining": "AutoModelForPreTraining",
}

DECODER = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
ENCODER = (
    *("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"),
    *("ForQuestionAnswering", "ForMultipleChoice"),
)
ENCODER_DECODER = (
    "Model",
    "EncoderModel",
    "ForConditionalGeneration",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Architecture:
    """One row: where an architecture lives, what it serves, and which promises its mathematics cannot keep."""

    name: str  # its folder in modeling/<family>, and the end of its model_type
    prefix: str  # of its classes: ArchRetNet -> ArchRetNetConfig, ArchRetNetModel, ArchRetNetForCausalLM
    family: str  # dense, hierarchical, long_context, moe, state_space
    title: str  # what people call it
    paper: str
    heads: tuple[str, ...] = DECODER
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    tiny: dict = field(default_factory=dict)  # fields of its tiny config, beside those that all have
    head_fields: dict[str, dict] = field(default_factory=dict)  # what a head asks of the config
    processor: bool = False  # whether its folder has a processing_<name>.py, registered with AutoProcessor
    exceptions: dict[str, str] = field(default_factory=dict)  # promise -> the mathematical reason that it cannot hold

    @property
    def model_type(self) -> str:
        return f"hf_arch_{self.name}"

    def load(self, suffix: str) -> type:
        """The class of `suffix`: "Config", "Model" or a head such as "ForCausalLM", or "Processor"."""
        suffixes = ("Config", *self.heads, *(("Processor",) if self.processor else ()))
        if suffix not in suffixes:
            raise ValueError(f"{self.name} has no {suffix}; it has {', '.join(suffixes)}.")
        kind = {"Config": "configuration", "Processor": "processing"}.get(suffix, "modeling")
        module = importlib.import_module(f"hf_arch.modeling.{self.family}.{self.name}.{kind}_{self.name}")
        return getattr(module, self.prefix + suffix)

    def tiny_config(self, head: str = "Model", **overrides):
        """A config for tests: two layers, a vocabulary of 96, every part of the architecture in use."""
        return self.load("Config")(**(TINY | self.tiny | self.head_fields.get(head, {}) | overrides))
