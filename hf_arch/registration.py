"""The catalogue, made known to transformers: to its Auto classes at `import hf_arch`, by name where a server asks."""

import transformers

from hf_arch.architecture import AUTO_CLASSES
from hf_arch.catalogue import ARCHITECTURES


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
