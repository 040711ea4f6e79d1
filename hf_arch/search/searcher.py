"""A model of ours as one of sentence-transformers, which gives the same vectors: for its trainers, its losses, and the
vector stores that take such models."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from hf_arch.publish import staged
from hf_arch.search.contrastive import pooling_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

MODES = {"mean": "mean", "first": "cls", "last": "lasttoken"}  # how sentence-transformers calls them
POOLED = {"text": {"method": "forward", "method_output_name": "pooler_output"}}


def sentence_transformer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    folder: str | Path,
    pooling: str | None = None,
) -> "SentenceTransformer":
    """The SentenceTransformer whose vectors are those of `hf_arch.embed(model, ..., pooling)`.

    It is saved to `folder` as a whole or not at all: `SentenceTransformer(folder)` loads it later, after `import
    hf_arch`, and `AutoModel` the model alone. `pooling` is as in `embed`. Raises ImportError where
    sentence-transformers is not installed, and ValueError for a model that is not a bare one. Example:

        searcher = hf_arch.sentence_transformer(model, tokenizer, "searcher")
        searcher.encode(["where is it said?"])
    """
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Normalize, Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling
    except ImportError as error:
        raise ImportError('sentence-transformers is not installed: pip install "hf-arch[search]".') from error

    how = pooling_of(model.config, pooling)
    if type(model) is not AutoModel._model_mapping.get(type(model.config), None) or model.config.is_encoder_decoder:
        raise ValueError(
            f"sentence-transformers reads texts by what AutoModel loads, which is no {type(model).__name__}: take a "
            "bare decoder or encoder."
        )
    if isinstance(tokenizer, PreTrainedTokenizerBase):  # saved with a processor once, it would name that from then on
        tokenizer = copy.copy(tokenizer)
        tokenizer._set_processor_class(None)
    with staged(folder) as stage:
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        if how == "document":
            modules = [Transformer(str(stage), module_output_name="sentence_embedding", modality_config=POOLED)]
        else:
            modules = [Transformer(str(stage)), Pooling(model.config.hidden_size, MODES[how])]
        SentenceTransformer(modules=[*modules, Normalize()], device="cpu").save(str(stage), create_model_card=False)
    return SentenceTransformer(str(folder), device=str(model.device))
