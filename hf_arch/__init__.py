"""Model architectures for the Hugging Face Hub. `import hf_arch` makes them known to transformers and PEFT."""

import importlib

from hf_arch.architecture import Architecture
from hf_arch.attention import register_attention, window_cache
from hf_arch.byte_tokenizer import byte_tokenizer
from hf_arch.catalogue import ARCHITECTURES, find
from hf_arch.convert import convert
from hf_arch.distill import distill
from hf_arch.export import export, push_to_hub
from hf_arch.groups import parameter_groups
from hf_arch.lora import lora_config, register_targets
from hf_arch.multitask import MultiTaskModel, TaskBatches, share_weights
from hf_arch.parallel_windows import parallel_windows
from hf_arch.question_answering import QuestionAnsweringPipeline, answer_features
from hf_arch.registration import register, register_pipeline
from hf_arch.states import fork, load_state, save_state
from hf_arch.upcycle import upcycle
from hf_arch.uptrain import uptrain

register()
register_pipeline()
register_targets()

LATER = {  # transformers' Trainer and collators take seconds to import
    "ContrastiveCollator": "collators",
    "ContrastiveTrainer": "contrastive",
    "MixerTrainer": "mixer_fitting",
    "PrefixLMCollator": "collators",
    "RoutingCallback": "routing",
    "RoutingStatistics": "routing",
    "SpanCorruptionCollator": "collators",
    "contrastive_loss": "contrastive",
    "embed": "contrastive",
    "recall_at": "contrastive",
    "Segments": "streams",
    "SentenceMaskCollator": "segment_collators",
    "StatefulTrainer": "streams",
    "describe": "description",
    "WholeWordMaskCollator": "collators",
    "routing_statistics": "routing",
}


def __getattr__(name: str):
    if name not in LATER:
        raise AttributeError(f"module 'hf_arch' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hf_arch.{LATER[name]}"), name)


__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "ContrastiveCollator",
    "ContrastiveTrainer",
    "MixerTrainer",
    "MultiTaskModel",
    "PrefixLMCollator",
    "QuestionAnsweringPipeline",
    "RoutingCallback",
    "RoutingStatistics",
    "Segments",
    "SentenceMaskCollator",
    "SpanCorruptionCollator",
    "StatefulTrainer",
    "TaskBatches",
    "WholeWordMaskCollator",
    "answer_features",
    "contrastive_loss",
    "byte_tokenizer",
    "convert",
    "describe",
    "distill",
    "embed",
    "export",
    "find",
    "fork",
    "load_state",
    "lora_config",
    "parallel_windows",
    "parameter_groups",
    "push_to_hub",
    "recall_at",
    "register_attention",
    "routing_statistics",
    "save_state",
    "share_weights",
    "upcycle",
    "uptrain",
    "window_cache",
]
