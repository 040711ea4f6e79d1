"""Batches for objectives that transformers has no collator for. Packing is `transformers.DataCollatorWithFlattening`,
masked language modelling `transformers.DataCollatorForLanguageModeling`."""

from dataclasses import dataclass

import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase


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
class ContrastiveCollator:
    """Pairs or triplets of texts, tokenized apart: for losses in which the other rows of a batch are the negatives
    (van den Oord et al., 2018, arXiv:1807.03748; Karpukhin et al., 2020, arXiv:2004.04906).

    An item names texts, {"query": text, "positive": text} and perhaps "negative": a text or as many as every other
    item has. A batch holds query_input_ids and query_attention_mask [batch, length], so for positive_, and for
    negative_ [batch * negatives, length], those of a row in turn. `prefixes` go before the texts of a column, such as
    {"query": "query: "}. Texts longer than `max_length` tokens are cut; by default at what the tokenizer allows. Give
    a Trainer `remove_unused_columns=False`: it would drop the texts.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None
    prefixes: dict[str, str] | None = None

    def __call__(self, items: list[dict[str, str | list[str]]]) -> dict[str, torch.Tensor]:
        batch = {}
        for column in ("query", "positive", "negative"):
            if column != "negative" or any(column in item for item in items):
                batch |= {f"{column}_{name}": value for name, value in self.tokens(column, items).items()}
        return batch

    def tokens(self, column: str, items: list[dict[str, str | list[str]]]) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask of the texts of one column."""
        if lacking := [number for number, item in enumerate(items) if not item.get(column)]:
            raise ValueError(
                f"Item {lacking[0]} of the batch has no {column!r}, only {', '.join(items[lacking[0]])}. Every item "
                "needs a query and a positive, and all a negative or none; remove_unused_columns=False keeps the texts."
            )
        texts = [[item[column]] if isinstance(item[column], str) else item[column] for item in items]
        counts = {len(of_item) for of_item in texts}
        if len(counts) > 1:
            raise ValueError(f"Items have {sorted(counts)} texts as {column!r}: make it one number.")
        prefix = (self.prefixes or {}).get(column, "")
        told = self.tokenizer(
            [prefix + text for of_item in texts for text in of_item],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        return {name: told[name] for name in ("input_ids", "attention_mask")}
