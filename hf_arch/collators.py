"""Batches for objectives that transformers has no collator for. Packing is `transformers.DataCollatorWithFlattening`,
masked language modelling `transformers.DataCollatorForLanguageModeling`.

Each follows transformers' protocol, `collator(items)`, for Trainer's `data_collator`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np
import torch
from torch.utils.data import get_worker_info
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollatorMixin
from transformers.processing_utils import ProcessorMixin


@dataclass
class WholeWordMaskCollator(DataCollatorForLanguageModeling):
    """transformers' masking of whole words, which takes only texts of one length, for texts of any length.

    Items are made by `tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)`. A word is what
    stands between gaps in the text. Give a Trainer `remove_unused_columns=False`: it would drop the offsets.
    """

    whole_word_mask: bool = True
    mask_replace_prob: float = 1.0  # transformers replaces whole words by the mask alone
    random_replace_prob: float = 0.0

    def torch_call(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        if lacking := {"offset_mapping", "special_tokens_mask"} - set(examples[0]):
            raise ValueError(
                f"Items lack {', '.join(sorted(lacking))}: tokenize with return_offsets_mapping=True and "
                "return_special_tokens_mask=True, and keep them by remove_unused_columns=False."
            )
        longest = max(len(example["input_ids"]) for example in examples)
        longest += -longest % (self.pad_to_multiple_of or 1)
        return super().torch_call([self.padded(dict(example), longest) for example in examples])

    def padded(self, example: dict, length: int) -> dict:
        """The item with as many offsets as its row of the batch will have tokens."""
        offsets = [tuple(pair) for pair in example["offset_mapping"]]
        more = [(0, 0)] * (length - len(offsets))
        left = self.tokenizer.padding_side == "left"
        return example | {"offset_mapping": more + offsets if left else offsets + more}


@dataclass
class SeededCollator:
    """Another collator, whose draws by torch's generator follow from the `input_ids` of the rows and the `seed` alone.

    A resumed run then hides the same tokens as one that went on, which a data loader that is a batch ahead would
    prevent; in another epoch, with other rows beside it, a row is treated otherwise.
    """

    collator: Callable[[list[dict]], dict[str, torch.Tensor]]
    seed: int = 0

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        rows = (np.asarray(item["input_ids"], dtype=np.int64).tobytes() for item in items)
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(crc32(b"".join(rows), self.seed))
            return self.collator(items)


@dataclass
class ContrastiveCollator:
    """Pairs or triplets of texts, tokenized apart, for `ContrastiveTrainer`: other rows of a batch are the negatives
    (van den Oord et al., 2018, arXiv:1807.03748; Karpukhin et al., 2020, arXiv:2004.04906).

    An item names texts, {"query": text, "positive": text} and perhaps "negative": a text or as many as every other
    item has. A batch holds query_input_ids and query_attention_mask [batch, length], so for positive_, and for
    negative_ [batch * negatives, length], those of a row in turn; and what else a processor says, if that takes the
    place of the tokenizer: then a text may be an image. `prefixes` go before the texts of a column, such as {"query":
    "query: "}. Texts longer than `max_length` tokens are cut; by default at what the tokenizer allows. Give a Trainer
    `remove_unused_columns=False`: it would drop the texts.
    """

    tokenizer: PreTrainedTokenizerBase | ProcessorMixin
    max_length: int | None = None
    prefixes: dict[str, str] | None = None

    def __call__(self, items: list[dict[str, str | list[str]]]) -> dict[str, torch.Tensor]:
        batch = {}
        for column in ("query", "positive", "negative"):
            if column != "negative" or any(column in item for item in items):
                batch |= {f"{column}_{name}": value for name, value in self.tokens(column, items).items()}
        return batch

    def tokens(self, column: str, items: list[dict[str, str | list[str]]]) -> dict[str, torch.Tensor]:
        """What the model is told of the texts of one column."""
        if lacking := [number for number, item in enumerate(items) if says_nothing(item.get(column))]:
            raise ValueError(
                f"Item {lacking[0]} of the batch has no {column!r}, only {', '.join(items[lacking[0]])}. Every item "
                "needs a query and a positive, and all a negative or none; remove_unused_columns=False keeps the texts."
            )
        texts = [item[column] if isinstance(item[column], list | tuple) else [item[column]] for item in items]
        counts = {len(of_item) for of_item in texts}
        if len(counts) > 1:
            raise ValueError(f"Items have {sorted(counts)} texts as {column!r}: make it one number.")
        prefix = (self.prefixes or {}).get(column, "")
        told = self.tokenizer(
            [prefix + text if isinstance(text, str) else text for of_item in texts for text in of_item],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return {name: value for name, value in told.items() if name != "token_type_ids"}


def says_nothing(text) -> bool:
    """Whether it is no text, nor an image, whose truth is not to be asked for."""
    return text is None or (isinstance(text, str | list | tuple) and not text)


@dataclass
class TextCollator(DataCollatorMixin):
    """What the two below share: a generator, rows without padding, and batches padded on the right, to a multiple of
    `pad_to_multiple_of` where that is given. An item is {"input_ids": ..., and perhaps "attention_mask"}, whose padding
    is dropped. With a `seed` the draws follow from it, in each worker of a data loader by itself; without one they
    follow torch's generator, which a Trainer restores when it resumes.

    pad_token_id (`int`): fills the ends of rows; labels are filled with -100.
    """

    pad_token_id: int = 0
    seed: int | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"
    drawn: np.random.Generator | None = field(default=None, init=False, repr=False)

    def generator(self) -> np.random.Generator:
        if self.seed is None:
            return np.random.default_rng(int(torch.randint(2**62, ())))
        if self.drawn is None:
            worker = get_worker_info()
            self.drawn = np.random.default_rng([self.seed, 0 if worker is None else 1 + worker.id])
        return self.drawn

    def rows(self, features: Sequence[dict]) -> Iterator[np.ndarray]:
        for feature in features:
            tokens = np.asarray(feature["input_ids"], dtype=np.int64)
            real = feature.get("attention_mask")
            tokens = tokens if real is None else tokens[np.asarray(real, dtype=bool)]
            if len(tokens) < 2:
                raise ValueError(f"A row has {len(tokens)} tokens: it takes two to hide one of them.")
            yield tokens

    def columns(self, tokens: np.ndarray, generator: np.random.Generator) -> dict[str, np.ndarray | int]:
        """What a row of tokens becomes: rows of "input_ids", "labels", ... and numbers."""
        raise NotImplementedError

    def numpy_call(self, features: Sequence[dict]) -> dict[str, np.ndarray]:
        generator = self.generator()
        rows = [self.columns(tokens, generator) for tokens in self.rows(features)]
        batch = {name: [row[name] for row in rows] for name in rows[0]}
        batch["attention_mask"] = [np.ones_like(row) for row in batch["input_ids"]]
        fillers = {"labels": -100, "attention_mask": 0}
        return {name: self.padded(values, fillers.get(name, self.pad_token_id)) for name, values in batch.items()}

    def torch_call(self, features: Sequence[dict]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(values) for name, values in self.numpy_call(features).items()}

    def padded(self, rows: list[np.ndarray] | list[int], filler: int) -> np.ndarray:
        if np.ndim(rows[0]) == 0:
            return np.asarray(rows, dtype=np.int64)
        longest, step = max(map(len, rows)), self.pad_to_multiple_of or 1
        longest = -(-longest // step) * step
        return np.stack([np.pad(row, (0, longest - len(row)), constant_values=filler) for row in rows])


@dataclass
class SpanCorruptionCollator(TextCollator):
    """Spans of the text hidden behind sentinels, and named by the answer (T5: arXiv:1910.10683, section 3.1.4).

    "a b c d e f g" -> input_ids "a <0> d e <1> eos", labels "<0> b c <1> f g eos". As in T5's code, the first span is
    never hidden and the last always is; `noise_density` of the tokens are hidden, in spans of `mean_span_length` on
    average, that is, one for each so many hidden tokens, of random lengths.

    sentinel_token_ids (`Sequence[int]`): the sentinels in order; `sorted(tokenizer.get_sentinel_token_ids())[::-1]`
        of a T5 tokenizer, whose first is the last of the vocabulary.
    eos_token_id (`int`, *optional*): ends both parts; a row that ends with it already is taken without it.
    decoder_start_token_id (`int`, *optional*): if given, batches have `decoder_input_ids`, which a Trainer needs that
        smooths labels; else the model makes them.
    """

    sentinel_token_ids: Sequence[int] = ()
    eos_token_id: int | None = None
    noise_density: float = 0.15
    mean_span_length: float = 3.0
    decoder_start_token_id: int | None = None

    def __post_init__(self):
        if not 0 < self.noise_density < 1 or self.mean_span_length < 1:
            raise ValueError(
                f"noise_density is {self.noise_density} and mean_span_length {self.mean_span_length}: the one lies "
                "between 0 and 1, the other is at least 1."
            )

    def counts(self, length: int) -> tuple[int, int]:
        """How many of `length` tokens are hidden, and in how many spans."""
        hidden = min(max(round(length * self.noise_density), 1), length - 1)
        return hidden, min(max(round(hidden / self.mean_span_length), 1), length - hidden)

    def raw_length(self, input_length: int) -> int:
        """The most tokens that a row may have for its input_ids to have no more than `input_length`."""
        if input_length < 2 + (self.eos_token_id is not None):
            raise ValueError(f"input_length {input_length} has no room for a token and a sentinel.")
        length = input_length
        while self.input_length(length + 1) <= input_length:
            length += 1
        return length

    def input_length(self, length: int) -> int:
        hidden, spans = self.counts(length)
        return length - hidden + spans + (self.eos_token_id is not None)

    def columns(self, tokens, generator):
        if self.eos_token_id is not None and tokens[-1] == self.eos_token_id and len(tokens) > 2:
            tokens = tokens[:-1]
        hidden, spans = self.counts(len(tokens))
        if spans > len(self.sentinel_token_ids):
            raise ValueError(
                f"A row of {len(tokens)} tokens has {spans} hidden spans, but there are {len(self.sentinel_token_ids)} "
                "sentinel_token_ids: give more, or shorter rows."
            )
        shown = self.lengths(len(tokens) - hidden, spans, generator)
        named = self.lengths(hidden, spans, generator)
        pieces = np.split(tokens, np.cumsum(np.stack((shown, named), axis=1).ravel())[:-1])
        sentinels = [np.array([token]) for token in self.sentinel_token_ids[:spans]]
        end = [] if self.eos_token_id is None else [np.array([self.eos_token_id])]
        source = [part for pair in zip(pieces[::2], sentinels, strict=True) for part in pair]
        answer = [part for pair in zip(sentinels, pieces[1::2], strict=True) for part in pair]
        row = {"input_ids": np.concatenate(source + end), "labels": np.concatenate(answer + end)}
        if self.decoder_start_token_id is not None:
            row["decoder_input_ids"] = np.concatenate(([self.decoder_start_token_id], row["labels"][:-1]))
        return row

    @staticmethod
    def lengths(total: int, parts: int, generator: np.random.Generator) -> np.ndarray:
        """`total` in `parts` positive numbers, each way to do so as likely as any other."""
        cuts = np.sort(generator.choice(total - 1, parts - 1, replace=False)) + 1
        return np.diff(np.concatenate(([0], cuts, [total])))


@dataclass
class PrefixLMCollator(TextCollator):
    """A prefix of random length is read, and the rest of the text named (T5: arXiv:1910.10683, section 3.2).

    For a decoder with direction="prefix": input_ids are the row, `prefix_length` says how many of its tokens see each
    other both ways, labels are -100 there. With `source_and_answer`, for an encoder-decoder: input_ids are the prefix,
    labels the rest.

    least, most (`float`): the share of the row that is prefix, at least and at most; each side has one token at least.
    """

    source_and_answer: bool = False
    least: float = 0.0
    most: float = 1.0

    def __post_init__(self):
        if not 0 <= self.least <= self.most <= 1:
            raise ValueError(f"A prefix cannot be from {self.least} to {self.most} of a row: shares go from 0 to 1.")

    def columns(self, tokens, generator):
        low, high = (min(max(round(share * len(tokens)), 1), len(tokens) - 1) for share in (self.least, self.most))
        prefix = int(generator.integers(low, high, endpoint=True))
        if self.source_and_answer:
            return {"input_ids": tokens[:prefix], "labels": tokens[prefix:]}
        labels = np.where(np.arange(len(tokens)) < prefix, -100, tokens)
        return {"input_ids": tokens, "labels": labels, "prefix_length": prefix}
