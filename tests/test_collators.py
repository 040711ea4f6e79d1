"""Batches: transformers' own collators do what they say with every row, ours add what they lack."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.testing import assert_close
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening, PreTrainedTokenizerFast

from hf_arch.collators import ContrastiveCollator, WholeWordMaskCollator
from promises import DECODERS, EXACT, some_tokens

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "whale", "##s", "swim", "##ming", "is", "deep", "##er", "than", "a", "ship", "sea"]
TEXTS = ["the whales swimming deeper", "the sea is deep", "a ship swimming is deeper than the whale"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    pieces = {piece: number for number, piece in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", pieces["[CLS]"]), ("[SEP]", pieces["[SEP]"])]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", model_max_length=12, **names)


@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in DECODERS if not case.answers], ids=str)
def test_flattened_documents_are_apart(case):
    decoder = case.build()
    documents = [some_tokens(1, length, seed=length)[0].tolist() for length in (23, 5, 40, 1)]
    batch = DataCollatorWithFlattening()([{"input_ids": document} for document in documents])
    outputs = decoder(**batch)
    alone = [decoder(torch.tensor([document]), labels=torch.tensor([document])) for document in documents]
    assert_close(outputs.logits, torch.cat([each.logits for each in alone], dim=1), **EXACT)
    predicted = [len(document) - 1 for document in documents]
    expected = sum(each.loss * count for each, count in zip(alone, predicted, strict=True) if count) / sum(predicted)
    assert_close(outputs.loss, expected)


MASKING = {"mlm_probability": 0.4, "mask_replace_prob": 1.0, "random_replace_prob": 0.0, "seed": 0}


@pytest.mark.parametrize("kind", [DataCollatorForLanguageModeling, WholeWordMaskCollator])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_masked_tokens_are_named(encoder, tokenizer, kind, side):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    whole_words = kind is WholeWordMaskCollator
    asked = {"return_special_tokens_mask": True, "return_offsets_mapping": whole_words}
    batch = kind(tokenizer, **MASKING, pad_to_multiple_of=4)([tokenizer(text, **asked) for text in TEXTS * 4])
    masked = batch["labels"] != -100
    assert batch["input_ids"].shape == (12, 12) and 0 < masked.sum() < masked.numel() / 2
    assert (batch["input_ids"][masked] == tokenizer.mask_token_id).all()
    assert not masked[batch["attention_mask"] == 0].any()
    ends = torch.tensor([number for number, piece in enumerate(SPECIAL + WORDS) if piece.startswith("##")])
    originals = torch.where(masked, batch["labels"], batch["input_ids"])
    split = torch.isin(originals[:, 1:], ends) & (masked[:, 1:] != masked[:, :-1])
    assert bool(split.any()) != whole_words  # a word is hidden whole, or not at all
    outputs = encoder(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
    expected = torch.nn.functional.cross_entropy(outputs.logits[masked], batch["labels"][masked])
    assert_close(outputs.loss, expected.float())


def test_words_without_their_places_are_refused(tokenizer):
    with pytest.raises(ValueError, match="lack offset_mapping, special_tokens_mask"):
        WholeWordMaskCollator(tokenizer)([tokenizer(TEXTS[0])])


def test_pairs_and_triplets_of_texts(tokenizer):
    first, second, third = TEXTS
    collate = ContrastiveCollator(tokenizer, prefixes={"query": "a "})
    batch = collate([{"query": first, "positive": second}, {"query": second, "positive": third}])
    assert set(batch) == {
        f"{kind}_{name}" for kind in ("query", "positive") for name in ("input_ids", "attention_mask")
    }
    found = tokenizer.batch_decode(batch["query_input_ids"], skip_special_tokens=True)
    assert found[1] == "a the sea is deep" and batch["query_attention_mask"].sum(1).tolist() == [10, 7]
    assert torch.equal(
        batch["positive_input_ids"], tokenizer([second, third], padding=True, return_tensors="pt").input_ids
    )

    triplets = [{"query": first, "positive": second, "negative": [third, first]} for _ in range(3)]
    batch = ContrastiveCollator(tokenizer, max_length=5)(triplets)
    assert batch["negative_input_ids"].shape == (6, 5) and batch["query_input_ids"].shape == (3, 5)
    assert torch.equal(batch["negative_input_ids"][0::2], batch["negative_input_ids"][:1].expand(3, -1))


def test_texts_that_do_not_fit_together_are_refused(tokenizer):
    collate, pair = ContrastiveCollator(tokenizer), {"query": "the sea", "positive": "deep"}
    with pytest.raises(ValueError, match="Item 1 of the batch has no 'positive', only query"):
        collate([pair, {"query": "a"}])
    with pytest.raises(ValueError, match="Item 0 of the batch has no 'negative'"):
        collate([pair, pair | {"negative": "ship"}])
    with pytest.raises(ValueError, match=r"\[1, 2\] texts as 'negative'"):
        collate([pair | {"negative": "ship"}, pair | {"negative": ["ship", "sea"]}])
