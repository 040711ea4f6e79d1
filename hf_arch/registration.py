"""The catalogue, made known to transformers: to its Auto classes at `import hf_arch`, by name where a server asks."""

import transformers
from transformers import pipelines

from hf_arch.architecture import AUTO_CLASSES
from hf_arch.catalogue import ARCHITECTURES
from hf_arch.question_answering import QuestionAnsweringPipeline

ANSWERING = "question-answering"


def register() -> None:
    """Make every architecture known to the Auto classes. Does nothing the second time, and overrides no one."""
    for row in ARCHITECTURES:
        config = row.load("Config")
        if row.model_type not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
            transformers.AutoConfig.register(row.model_type, config)
        if "ForCausalLM" in row.heads:  # Trainer's label smoothing shifts the labels of the classes named here only
            names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            names.setdefault(row.model_type, f"{row.prefix}ForCausalLM")
        if row.processor and config not in transformers.models.auto.processing_auto.PROCESSOR_MAPPING:
            transformers.AutoProcessor.register(config, row.load("Processor"))
        for head in row.heads:
            auto = getattr(transformers, AUTO_CLASSES[head])
            if config not in auto._model_mapping:
                auto.register(config, row.load(head))


def expose() -> None:
    """Put our classes on the transformers module. There `transformers serve` and vLLM look for the class that a config
    names; nothing else needs it. For this process, as often as one likes; our names (`Arch...`) meet no other."""
    for row in ARCHITECTURES:
        for head in row.heads:
            setattr(transformers, f"{row.prefix}{head}", row.load(head))


def register_pipeline() -> None:
    """Bring question answering back, which transformers 5 dropped. Does nothing where there is such a pipeline."""
    if ANSWERING in pipelines.PIPELINE_REGISTRY.supported_tasks:
        return
    # else `pipeline` says that it was removed, whatever is registered
    getattr(pipelines, "REMOVED_TASKS", {}).pop(ANSWERING, None)
    pipelines.PIPELINE_REGISTRY.register_pipeline(
        ANSWERING,
        QuestionAnsweringPipeline,
        pt_model=transformers.AutoModelForQuestionAnswering,
        default={"model": ("distilbert/distilbert-base-cased-distilled-squad", "main")},
        type="text",
    )
    # a saved pipeline is its model and tokenizer: named in the config, it would load as remote code alone
    del QuestionAnsweringPipeline._registered_impl
