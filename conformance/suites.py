"""A class of tests for each row of the catalogue, or several, where heads want configs that differ."""

import functools
import unittest

import torch
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

from hf_arch import ARCHITECTURES, Architecture

from .upstream import test_expert_parallel_mixin, test_fsdp_mixin, test_tensor_parallel_mixin
from .upstream.generation.test_utils import GenerationTesterMixin
from .upstream.test_configuration_common import ConfigTester
from .upstream.test_modeling_common import ModelTesterMixin, ids_tensor
from .upstream.test_training_mixin import TrainingTesterMixin

MAPPINGS = {
    "Model": "MODEL_MAPPING_NAMES",
    "EncoderModel": "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
    "ForConditionalGeneration": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "ForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "ForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "ForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "ForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "ForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "ForMultipleChoice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "ForSegmentClassification": "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES",
    "ForPreTraining": "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
}


class ModelTester:
    """What the mixins ask for a config, inputs and classes; they also read the fields of the config here."""

    batch_size, seq_length, is_training, num_choices = 13, 7, True, 2

    def __init__(self, row: Architecture, heads: tuple[str, ...]):
        self.row, self.heads = row, heads
        config = self.get_config()
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_labels"):
            setattr(self, name, getattr(config, name))
        self.base_model_class = row.load(heads[0])
        self.causal_lm_class = row.load("ForCausalLM") if "ForCausalLM" in heads else None

    def get_config(self):
        return self.row.tiny_config(self.heads[-1])

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        attention_mask = torch.tril(torch.ones_like(input_ids)).to(torch_device)  # rows padded on the right
        config, inputs = self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}
        if config.is_encoder_decoder:
            inputs |= {"decoder_input_ids": input_ids, "decoder_attention_mask": attention_mask}
        return config, inputs


class Suite(ModelTesterMixin, TrainingTesterMixin):
    row: Architecture
    heads: tuple[str, ...]
    model_tester = None  # the mixins have an abstract property of this name
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = ModelTester(self.row, self.heads)
        sizes = {name: getattr(self.model_tester, name) for name in ("hidden_size", "num_attention_heads")}
        self.config_tester = ConfigTester(self, self.row.load("Config"), **sizes)

    @property
    def all_model_classes(self) -> tuple[type, ...]:
        return tuple(self.row.load(head) for head in self.heads)

    @functools.cached_property
    def has_attentions(self) -> bool:
        """Whether every layer records the weights of an attention over all tokens."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config._attn_implementation = "eager"
        outputs = self.row.load(self.heads[0])(config).eval()(**inputs, output_attentions=True)
        recorded = outputs.get("decoder_attentions" if config.is_encoder_decoder else "attentions") or ()
        length = self.model_tester.seq_length
        return [tuple(weights.shape[-2:]) for weights in recorded] == [(length, length)] * config.num_hidden_layers

    @property
    def is_encoder_decoder(self) -> bool:
        return self.model_tester.get_config().is_encoder_decoder

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """transformers' own heads over sentences see two; those of its heads for pretraining ask what is their own."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class.__name__.endswith("ForPreTraining"):
            inputs["labels"] = inputs["input_ids"]
        if return_labels and model_class.__name__.endswith("ForSegmentClassification"):
            inputs["labels"] = inputs["labels"][:, None]
        return inputs

    def _get_trainable_model_class(self) -> type:
        return self.model_tester.causal_lm_class or self.all_model_classes[-1]

    def test_config(self):
        self.config_tester.run_common_tests()


class GeneratingSuite(
    Suite,
    GenerationTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_expert_parallel_mixin.ExpertParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
):
    pass


def open_closed_lists() -> None:
    """The mixins know classes by name, and distribute only some of transformers' own model types."""
    for row in ARCHITECTURES:
        for head in row.heads:
            getattr(modeling_auto, MAPPINGS[head])[row.model_type] = row.prefix + head
        if "EncoderModel" in row.heads:  # which has no loss either
            modeling_auto.MODEL_MAPPING_NAMES[row.model_type] = (f"{row.prefix}Model", f"{row.prefix}EncoderModel")
    test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
    test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None
    test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None


def groups_of_heads(row: Architecture) -> list[tuple[str, ...]]:
    """Heads that share a config are tested together, and with them the bare model, unless they are of one stack of it
    alone."""
    groups: dict[str, list[str]] = {}
    for head in row.heads:
        fields = row.head_fields.get(head, {})
        group = groups.setdefault(repr(fields), ["Model"] if fields.get("is_encoder_decoder", True) else [])
        group.append(head)
    return [tuple(dict.fromkeys(heads)) for heads in groups.values()]


def suites() -> dict[str, type[unittest.TestCase]]:
    classes = {}
    for row in ARCHITECTURES:
        for heads in groups_of_heads(row):
            base = GeneratingSuite if "ForCausalLM" in heads else Suite
            name = row.prefix + ("Test" if len(heads) > 2 else f"{heads[-1]}Test")
            classes[name] = type(name, (base, unittest.TestCase), {"row": row, "heads": heads})
    return classes
