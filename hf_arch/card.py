"""The model card of an exported checkpoint: what it is, how to load it, what it cannot do."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from hf_arch.architecture import AUTO_CLASSES, Architecture

PIPELINES = {
    "Model": "feature-extraction",
    "EncoderModel": "feature-extraction",
    "ForCausalLM": "text-generation",
    "ForConditionalGeneration": "text2text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}

NUMBERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")

TEXT = """# {name}

{title} ({paper}) with {parameters:,} parameters, for [transformers](https://github.com/huggingface/transformers).

Where hf_arch is installed:

```python
import hf_arch
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{name}")
```

Elsewhere, with the code in this repository:

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)
```

| | |
|---|---|
{numbers}
"""


def model_card(model: PreTrainedModel, row: Architecture, head: str, name: str) -> ModelCard:
    """The card of `model` under `name`, the repository or folder that it is loaded from."""
    base = origin(model)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINES.get(head),
        tags=["hf_arch", row.family, row.name],
        base_model=base if base != name else None,
    )
    numbers = {field: getattr(model.config, field, None) for field in NUMBERS}
    text = TEXT.format(
        name=name,
        title=row.title,
        paper=linked(row.paper),
        parameters=model.num_parameters(),
        auto_class=AUTO_CLASSES[head],
        numbers="\n".join(f"| {field} | {number} |" for field, number in numbers.items() if number is not None),
    )
    if row.exceptions:
        text += "\nWhat this architecture cannot do:\n\n"
        text += "".join(f"- {promise}: {reason}\n" for promise, reason in row.exceptions.items())
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def linked(paper: str) -> str:
    number = paper.removeprefix("arXiv:")
    return paper if number == paper else f"[{paper}](https://arxiv.org/abs/{number})"


def origin(model: PreTrainedModel) -> str | None:
    """The Hub repository that `model` was loaded from, where it was loaded from one."""
    name = model.name_or_path
    if not name or Path(name).exists():
        return None
    try:
        return name if isinstance(try_to_load_from_cache(name, CONFIG_NAME), str) else None
    except HFValidationError:  # a path that is gone
        return None
