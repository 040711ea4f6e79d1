"""Model architectures for the Hugging Face Hub. `import hf_arch` makes them known to transformers and PEFT."""

import importlib

from hf_arch.architecture import Architecture
from hf_arch.attention import register_attention, window_cache
from hf_arch.byte_tokenizer import byte_tokenizer
from hf_arch.catalogue import ARCHITECTURES, find
from hf_arch.convert import convert
from hf_arch.export import export, push_to_hub
from hf_arch.groups import parameter_groups
from hf_arch.lora import lora_config, register_targets
from hf_arch.multitask import MultiTaskModel, TaskBatches, share_weights
from hf_arch.parallel_windows import parallel_windows
from hf_arch.question_answering import QuestionAnsweringPipeline, answer_features
from hf_arch.registration import register, register_pipeline
from hf_arch.remake.distill import distill
from hf_arch.remake.upcycle import upcycle
from hf_arch.remake.uptrain import uptrain
from hf_arch.search.inverse_cloze import inverse_cloze
from hf_arch.states import fork, load_state, save_state, state_bytes

register()
register_pipeline()
register_targets()

LATER = {  # transformers' Trainer and collators take seconds to import
    "ContrastiveCollator": "collators",
    "ContrastiveTrainer": "search.contrastive",
    "MixerTrainer": "remake.mixer_fitting",
    "NearDuplicates": "corpus.duplicates",
    "NoisyCollator": "corpus.noise",
    "PrefixLMCollator": "collators",
    "RoutingCallback": "routing",
    "RoutingStatistics": "routing",
    "SeededCollator": "collators",
    "Segments": "streams",
    "SentenceMaskCollator": "segment_collators",
    "SpanCorruptionCollator": "collators",
    "StatefulTrainer": "streams",
    "WholeWordMaskCollator": "collators",
    "contrastive_loss": "search.contrastive",
    "describe": "description",
    "draw_ranks": "search.picture",
    "embed": "search.contrastive",
    "embed_texts": "search.contrastive",
    "hard_negatives": "search.ranking",
    "load_word_vectors": "word_vectors",
    "mean_reciprocal_rank": "search.ranking",
    "ranks": "search.ranking",
    "recall_at": "search.ranking",
    "routing_statistics": "routing",
    "sentence_transformer": "search.searcher",
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
    "NearDuplicates",
    "NoisyCollator",
    "PrefixLMCollator",
    "QuestionAnsweringPipeline",
    "RoutingCallback",
    "RoutingStatistics",
    "SeededCollator",
    "Segments",
    "SentenceMaskCollator",
    "SpanCorruptionCollator",
    "StatefulTrainer",
    "TaskBatches",
    "WholeWordMaskCollator",
    "answer_features",
    "byte_tokenizer",
    "contrastive_loss",
    "convert",
    "describe",
    "distill",
    "draw_ranks",
    "embed",
    "embed_texts",
    "export",
    "find",
    "fork",
    "hard_negatives",
    "inverse_cloze",
    "load_state",
    "load_word_vectors",
    "lora_config",
    "mean_reciprocal_rank",
    "parallel_windows",
    "parameter_groups",
    "push_to_hub",
    "ranks",
    "recall_at",
    "register_attention",
    "routing_statistics",
    "save_state",
    "sentence_transformer",
    "share_weights",
    "state_bytes",
    "upcycle",
    "uptrain",
    "window_cache",
]
