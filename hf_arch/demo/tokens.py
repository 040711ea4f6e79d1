"""From text to tokens: a byte-level BPE tokenizer of our own, and one stream of tokens for each part of a corpus."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_arch.demo.text import Corpus, Document

END, PADDING = "<|endoftext|>", "<|padding|>"


def train_tokenizer(documents: list[Document], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: any text can be written
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PADDING)


@dataclass(frozen=True)
class Figures:
    loss: float  # nats per token
    bits_per_byte: float


@dataclass(frozen=True)
class Stream:
    """Documents one after another as tokens, END before the first and after each."""

    tokens: np.ndarray
    size: int  # of the text, in bytes of UTF-8

    @classmethod
    def of(cls, documents: list[Document], tokenizer: PreTrainedTokenizerBase) -> "Stream":
        end = tokenizer.eos_token_id
        parts = tokenizer([document.text for document in documents], split_special_tokens=True)["input_ids"]
        tokens = np.array([end, *(token for part in parts for token in (*part, end))])
        return cls(tokens, sum(len(document.text.encode()) for document in documents))

    def figures(self, loss: float) -> Figures:
        """`loss` is the mean over all tokens but the first, which is given."""
        return Figures(loss, loss * (len(self.tokens) - 1) / math.log(2) / self.size)


@dataclass(frozen=True)
class TokenizedCorpus:
    name: str
    train: Stream
    held_out: Stream
    prompt: str  # how a held-out document begins

    @classmethod
    def of(cls, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, length: int) -> "TokenizedCorpus":
        """Raises ValueError where there is not one window of `length` tokens to train on or to measure with."""
        train, held_out = (Stream.of(documents, tokenizer) for documents in (corpus.train, corpus.held_out))
        if min(len(train.tokens), len(held_out.tokens)) <= length:
            raise ValueError(
                f"{corpus.name.capitalize()} repeats itself so much that few tokens say all. Give other text."
            )
        return cls(corpus.name, train, held_out, tokenizer.decode(held_out.tokens[1:9]))


class Windows(Dataset):
    """Every window of `length` tokens of a stream. Documents are packed: a window may hold the end of one and the
    start of the next."""

    def __init__(self, stream: Stream, length: int):
        self.windows = torch.from_numpy(stream.tokens).unfold(0, length, 1)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}
