"""What a model can be taught by text alone: for each objective the heads that learn it, the rows that they are told,
and what is asked of them.

| objective | heads | rows | asked |
|---|---|---|---|
| causal | ForCausalLM | packed documents | every next token |
| prefix | ForConditionalGeneration, ForCausalLM with direction="prefix" | a piece of a document | the rest of it |
| masked | ForMaskedLM | packed documents | tokens hidden at random |
| span | ForConditionalGeneration | a piece of a document | hidden spans |
| hierarchical | ForPreTraining | segments of a document | hidden tokens, hidden segments |
"""

from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, PreTrainedTokenizerBase

from hf_arch.architecture import Architecture
from hf_arch.catalogue import ARCHITECTURES
from hf_arch.collators import PrefixLMCollator, SeededCollator, SpanCorruptionCollator
from hf_arch.corpus.noise import WAYS, NoisyCollator
from hf_arch.corpus.packing import pack, pieces
from hf_arch.corpus.streaming import token_documents
from hf_arch.modeling.skeleton.loss import next_tokens
from hf_arch.segment_collators import SentenceMaskCollator
from hf_arch.streams import collate_segments

Batch = dict[str, torch.Tensor]


class Objective:
    """An objective for one architecture, one tokenizer, and rows of at most `length` tokens.

    `objective("span", row, tokenizer, 512)` finds it, and adds the special tokens that it needs to the tokenizer.
    Raises ValueError for an architecture that has no head for it, and names those that have.
    """

    heads: ClassVar[tuple[str, ...]] = ()
    ways: ClassVar[tuple[str, ...]] = WAYS  # in which `NoisyCollator` may touch a batch
    answers_apart: ClassVar[bool] = False  # whether the labels are a text of their own, beside the input

    def __init__(self, row: Architecture, tokenizer: PreTrainedTokenizerBase, length: int):
        self.row, self.length, self.tokenizer = row, length, tokenizer
        self.head = self.head_of(row)
        if tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no eos_token, which parts documents.")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.add_tokens(tokenizer)
        self.collator = SeededCollator(self.make_collator())

    @classmethod
    def head_of(cls, row: Architecture) -> str | None:
        """The head of the architecture that learns the objective."""
        return next((head for head in cls.heads if head in row.heads), None)

    def add_tokens(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """The special tokens that the objective needs, where the tokenizer lacks them."""

    def make_collator(self) -> Callable[[list[dict]], Batch]:
        raise NotImplementedError

    def fields(self) -> dict:
        """What the objective asks of the config beside its head."""
        return {}

    def config(self, **sizes):
        """The architecture's config for the head, the tokenizer and the length; `sizes` are fields of it."""
        kind, tokenizer = self.row.load("Config"), self.tokenizer
        told = {"vocab_size": len(tokenizer), "max_position_embeddings": self.length}
        told |= {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        if self.head == "ForConditionalGeneration":
            told["decoder_start_token_id"] = tokenizer.pad_token_id
        if hasattr(kind, "segment_lengths"):
            told |= {"segment_lengths": [self.segment_length], "max_position_embeddings": 8 * self.segment_length}
        return kind(**(told | self.row.head_fields.get(self.head, {}) | self.fields() | sizes))

    @property
    def segment_length(self) -> int:
        """Of hierarchies whose segments have a length: eight are a row."""
        return max(-(-self.length // 8), 2)

    def rows(self, texts: Iterable[str]) -> Iterator[dict]:
        """What the collator makes batches of."""
        return pack(token_documents(iter(texts), self.tokenizer), self.length)

    def noisy(self, rate: float) -> SeededCollator:
        """The collator with noise that leaves the labels true."""
        keep = self.special_ids()
        vocabulary = sorted(set(range(len(self.tokenizer))) - set(keep))
        along = [name for name in NoisyCollator.along if name != "labels" or not self.answers_apart]
        return SeededCollator(NoisyCollator(self.make_collator(), rate, vocabulary, keep, self.ways, along))

    def special_ids(self) -> list[int]:
        return self.tokenizer.all_special_ids

    @staticmethod
    def targets(batch: Batch) -> torch.Tensor:
        """[batch, length] the token that each place of the logits should name, -100 for none."""
        return batch["labels"]

    @torch.no_grad()
    def loss(self, model: PreTrainedModel, rows: Dataset | list[dict], batch_size: int = 32) -> tuple[float, int]:
        """Nats of all tokens that are asked in the rows, and their number. What is hidden follows from the rows, so
        that all models are asked the same."""
        was_training, nats, count = model.training, 0.0, 0
        model.eval()
        for batch in DataLoader(rows, batch_size, collate_fn=self.collator):
            batch = {name: values.to(model.device) for name, values in batch.items()}
            targets = self.targets(batch)
            logits = model(**batch).logits.float()
            nats += cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
            count += int((targets != -100).sum())
        model.train(was_training)
        return nats, count


class Causal(Objective):
    heads = ("ForCausalLM",)

    def make_collator(self):
        return collate_segments

    @staticmethod
    def targets(batch):
        return batch["shift_labels"]


class Masked(Objective):
    """Hides 15 % of the tokens, as BERT does (Devlin et al., 2019, arXiv:1810.04805, section 3.1)."""

    heads = ("ForMaskedLM",)

    def add_tokens(self, tokenizer):
        if tokenizer.mask_token is None:
            tokenizer.add_special_tokens({"mask_token": "<|mask|>"})

    def make_collator(self):
        return DataCollatorForLanguageModeling(self.tokenizer)

    def rows(self, texts):
        names = ("input_ids", "attention_mask", "position_ids")
        return ({name: row[name] for name in names} for row in super().rows(texts))


class OfPieces(Objective):
    """Encoder-decoders, and what else reads one document a row: the batch is padded."""

    def rows(self, texts):
        return pieces(token_documents(iter(texts), self.tokenizer, begin=False), self.length)


class Span(OfPieces):
    heads = ("ForConditionalGeneration",)
    answers_apart = True

    def add_tokens(self, tokenizer):
        _, spans = SpanCorruptionCollator().counts(self.length)
        self.sentinels = [f"<extra_id_{number}>" for number in range(spans)]
        tokenizer.add_tokens(self.sentinels, special_tokens=True)

    def make_collator(self):
        return SpanCorruptionCollator(
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            sentinel_token_ids=self.tokenizer.convert_tokens_to_ids(self.sentinels),
        )

    def special_ids(self):
        return [*super().special_ids(), *self.tokenizer.convert_tokens_to_ids(self.sentinels)]


class Prefix(OfPieces):
    heads = ("ForConditionalGeneration", "ForCausalLM")

    @classmethod
    def head_of(cls, row):
        head = super().head_of(row)
        takes_prefix = "prefix" in getattr(row.load("Config"), "layer_kinds_of", {})
        return head if head == "ForConditionalGeneration" or takes_prefix else None

    @property
    def answers_apart(self):
        return self.head == "ForConditionalGeneration"

    @property
    def ways(self):
        return WAYS if self.answers_apart else ("replace",)

    def fields(self):
        return {} if self.answers_apart else {"direction": "prefix"}

    def make_collator(self):
        return PrefixLMCollator(pad_token_id=self.tokenizer.pad_token_id, source_and_answer=self.answers_apart)

    def targets(self, batch):
        return batch["labels"] if self.answers_apart else next_tokens(batch["labels"])


class Hierarchical(Masked):
    heads = ("ForPreTraining",)
    ways = ("replace",)

    def make_collator(self):
        return SentenceMaskCollator(self.processor)

    @property
    def processor(self):
        told = {"segmentation": "sentence", "segment_length": self.segment_length, "max_segments": 2**31}  # cut later
        return self.row.load("Processor")(self.tokenizer, **told)

    def rows(self, texts):
        """Eight segments each, of as many whole sentences as fit; the last of a document may have fewer."""
        processor = self.processor
        for text in texts:
            told = processor(text)
            begins = [place for place, start in enumerate(told["segment_starts"]) if start]
            for first in range(0, len(begins), 8):
                part = slice(begins[first], begins[first + 8] if first + 8 < len(begins) else None)
                yield {name: values[part] for name, values in told.items()}


OBJECTIVES = {"causal": Causal, "prefix": Prefix, "masked": Masked, "span": Span, "hierarchical": Hierarchical}


def check_objective(name: str, row: Architecture) -> None:
    """Raises ValueError for an objective that is unknown, or that no head of the architecture learns."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective {name!r} is unknown; there are {', '.join(OBJECTIVES)}.")
    if OBJECTIVES[name].head_of(row) is None:
        able = ", ".join(other.name for other in ARCHITECTURES if OBJECTIVES[name].head_of(other))
        learns = ", ".join(other for other, kind in OBJECTIVES.items() if kind.head_of(row))
        raise ValueError(f"{row.name} has no head for the objective {name}, but for {learns}; {able} have one.")


def objective(name: str, row: Architecture, tokenizer: PreTrainedTokenizerBase, length: int) -> Objective:
    """The objective called `name`, for an architecture, a tokenizer and rows of `length` tokens."""
    check_objective(name, row)
    return OBJECTIVES[name](row, tokenizer, length)
