"""Texts as vectors that are near where the texts say the same, for search: any model of ours learns it from pairs."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_gather
from transformers import EvalPrediction, PreTrainedConfig, Trainer

from hf_arch.collators import ContrastiveCollator
from hf_arch.search.ranking import mean_reciprocal_rank, recall_at

COLUMNS = ("query", "positive", "negative")


def mean(outputs, real: torch.Tensor) -> torch.Tensor:
    shares = real.to(outputs.last_hidden_state.dtype)
    return (shares[..., None] * outputs.last_hidden_state).sum(1) / shares.sum(1, keepdim=True)


def first(outputs, real: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(len(real), device=real.device)
    return outputs.last_hidden_state[rows, real.int().argmax(-1)]


def last(outputs, real: torch.Tensor) -> torch.Tensor:
    places = torch.arange(real.shape[1], device=real.device)
    return outputs.last_hidden_state[torch.arange(len(real), device=real.device), (places * real).argmax(-1)]


def document(outputs, real: torch.Tensor) -> torch.Tensor:
    return outputs.pooler_output


POOLINGS = {"mean": mean, "first": first, "last": last, "document": document}


def pooling_of(config: PreTrainedConfig, pooling: str | None = None) -> str:
    """`pooling`, or what is the way of the architecture."""
    spoken = getattr(config, "pooling", "")
    how = pooling or ("document" if spoken.startswith("document") else "last" if spoken == "last" else "mean")
    if how not in POOLINGS:
        raise ValueError(f"pooling {how!r} is unknown; there are {', '.join(POOLINGS)}.")
    return how


def embed(model: nn.Module, inputs: dict[str, torch.Tensor], pooling: str | None = None) -> torch.Tensor:
    """What the model makes of each text, as a vector of length 1: [texts, size].

    inputs: what a tokenizer or processor says of texts, attention_mask among it. pooling: "mean" over the real tokens,
    the "first" or the "last" of these, or "document", what a hierarchical model says of each itself; by default that
    where there is such, else the last token of a causal model, the mean of others.
    """
    how = pooling_of(getattr(model, "module", model).config, pooling)
    if "attention_mask" not in inputs:
        raise ValueError("Texts are told without attention_mask: it says where each ends.")
    return F.normalize(POOLINGS[how](model(**inputs), inputs["attention_mask"].bool()), dim=-1)


@torch.no_grad()
def embed_texts(
    model: nn.Module, tokenizer, texts: Sequence[str], pooling: str | None = None, batch_size: int = 64
) -> torch.Tensor:
    """The vectors of texts, or of whatever else the processor reads, in evaluation: [texts, size].

    tokenizer: a tokenizer or a processor, at whose longest length texts are cut; pooling as in `embed`.
    """
    if isinstance(texts, str) or not len(texts):
        raise ValueError("Give at least one text, in a list.")
    was_training, found = model.training, []
    model.eval()
    for start in range(0, len(texts), batch_size):
        part = list(texts[start : start + batch_size])
        told = tokenizer(part, padding=True, truncation=True, return_tensors="pt").to(model.device)
        found.append(embed(model, {name: x for name, x in told.items() if name != "token_type_ids"}, pooling))
    model.train(was_training)
    return torch.cat(found)


def contrastive_loss(queries: torch.Tensor, candidates: torch.Tensor, temperature: float = 0.05) -> torch.Tensor:
    """mean_i -log softmax_j(q_i . c_j / temperature)_i: InfoNCE with the other candidates of the batch as negatives
    (van den Oord et al., 2018, arXiv:1807.03748, equation 4).

    queries [batch, size]; candidates [batch + hard negatives, size], the one that fits query i in the i-th place.
    """
    scores = queries @ candidates.T / temperature
    return F.cross_entropy(scores, torch.arange(len(queries), device=scores.device))


def everywhere(vectors: torch.Tensor) -> list[torch.Tensor]:
    """Vectors [batch, size] of all processes, our own first; gradients go back to each. Then a mean of the processes'
    losses is that of one process with all of the batch."""
    if not (dist.is_available() and dist.is_initialized()):
        return [vectors]
    parts, own = all_gather(vectors), dist.get_rank()
    return [parts[own], *parts[:own], *parts[own + 1 :]]


class ContrastiveTrainer(Trainer):
    """A Trainer of batches of a `ContrastiveCollator`, whose model is a bare one (`AutoModel`).

    temperature: of the cosines in the loss. pooling: as in `embed`. recalls: evaluation tells `recall_at_<k>` of all
    queries of `eval_dataset` among all its positives, and `mrr`, the mean reciprocal rank. Negatives are those of the
    batch, of all processes together; a batch that is accumulated in pieces has those of a piece. Arguments need
    `remove_unused_columns=False`.
    """

    def __init__(
        self,
        *args,
        temperature: float = 0.05,
        pooling: str | None = None,
        recalls: Sequence[int] = (1, 10),
        **options,
    ):
        options.setdefault("compute_metrics", self.recall_metrics)
        super().__init__(*args, **options)
        if self.args.remove_unused_columns:
            raise ValueError("The Trainer would drop the texts: give its arguments remove_unused_columns=False.")
        self.temperature, self.pooling, self.recalls = temperature, pooling, recalls
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch, made here

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        found = {column: embed(model, told, self.pooling) for column, told in columns(inputs).items()}
        if lacking := [column for column in COLUMNS[:2] if column not in found]:
            raise ValueError(f"The batch has no {lacking[0]}_input_ids: take a {ContrastiveCollator.__name__}.")
        candidates = torch.cat(
            [part for column in COLUMNS[1:] if column in found for part in everywhere(found[column])]
        )
        loss = contrastive_loss(found["query"], candidates, self.temperature)
        return (loss, found) if return_outputs else loss

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, found = self.compute_loss(model, self._prepare_inputs(inputs), True)
        rows = torch.arange(len(found["query"]), device=loss.device)
        return loss, (found["query"], found["positive"]), rows

    def recall_metrics(self, evaluated: EvalPrediction) -> dict[str, float]:
        queries, positives = (torch.as_tensor(each) for each in evaluated.predictions)
        found = {f"recall_at_{k}": recall_at(queries, positives, k) for k in self.recalls}
        return found | {"mrr": mean_reciprocal_rank(queries, positives)}


def columns(inputs: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """What the model is told of the texts of each column of a batch."""
    told = {
        column: {name.removeprefix(f"{column}_"): x for name, x in inputs.items() if name.startswith(f"{column}_")}
        for column in COLUMNS
    }
    return {column: inputs for column, inputs in told.items() if inputs}
