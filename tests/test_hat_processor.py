"""The processor of HAT: where segments begin, what is padded, and that it comes back with its model."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import AutoProcessor, DataCollatorWithPadding, PreTrainedTokenizerFast

from hf_arch import export, find
from promises import EXACT, Case

ROW = find("hat")
CLS = 1


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "<s>", "</s>", "<mask>", "<unk>", ".", "!", *"abcdefghijklmnopqrstuvwxyz"]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "cls_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", **special)


@pytest.fixture
def make(tokenizer):
    return lambda **fields: ROW.load("Processor")(tokenizer, **({"segment_length": 5, "max_segments": 16} | fields))


def words(processor, ids: list[int]) -> str:
    return " ".join(processor.tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize(
    "segmentation, text, said",
    [
        ("fixed", "a b c d e f", "<s> a b c d <s> e f"),
        ("fixed", "a", "<s> a"),
        ("fixed", "", "<s>"),
        ("fixed", " \n ", "<s>"),
        ("sentence", "a b. c! d e f.", "<s> a b . <s> c ! <s> d e f ."),
        ("sentence", "a. b. c.", "<s> a . b . <s> c ."),
        ("sentence", "a b c d e f. g", "<s> a b c d <s> e f . g"),
        ("sentence", "a\n\nb c d e", "<s> a <s> b c d e"),
        ("paragraph", "a. b.\n\nc\n \nd", "<s> a . b . <s> c d"),
        ("paragraph", "\n\n\n\n", "<s>"),
        ("sentence", ["a", "", "b c d e f", "g"], "<s> a <s> b c d e <s> f <s> g"),
    ],
)
def test_segments_begin_with_a_leader(make, segmentation, text, said):
    processor = make(segmentation=segmentation)
    found = processor([text])
    assert words(processor, found["input_ids"][0]) == said
    assert found["segment_starts"][0] == [int(token == CLS) for token in found["input_ids"][0]]
    assert found["attention_mask"][0] == [1] * len(found["input_ids"][0])
    if isinstance(text, str):
        assert processor(text)["input_ids"] == found["input_ids"][0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_says_what_its_texts_say_alone(make, tokenizer, side, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", side)
    processor, model = make(segmentation="sentence"), Case(ROW, "Model").build()
    texts = ["a b. c! d e f. g", "h.", "i j k l m n o p q r"]
    batch = processor(texts, padding=True, return_tensors="pt")
    collated = DataCollatorWithPadding(processor)([dict(processor(text)) for text in texts])
    for name, tensor in batch.items():
        assert torch.equal(collated[name], tensor)
    with torch.no_grad():
        together = model(**batch).pooler_output
        for text, expected in zip(texts, together, strict=True):
            assert_close(model(**processor(text, return_tensors="pt")).pooler_output[0], expected, **EXACT)


def test_it_is_saved_and_loaded_with_the_model(make, tmp_path):
    processor = make(segmentation="paragraph", max_segments=3)
    processor.save_pretrained(tmp_path)
    Case(ROW, "Model").build().save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor)
    assert (loaded.segmentation, loaded.segment_length, loaded.max_segments) == ("paragraph", 5, 3)
    assert loaded("a b\n\nc d e")["segment_starts"] == processor("a b\n\nc d e")["segment_starts"]


@pytest.mark.parametrize("given", [False, True])
def test_an_exported_folder_brings_it_along(make, tmp_path, given):
    processor, model = make(segmentation="sentence"), Case(ROW, "Model").build(torch.float32)
    if not given:
        processor.save_pretrained(tmp_path / "saved")
        model.save_pretrained(tmp_path / "saved")
    folder = tmp_path / "exported"
    export(model if given else tmp_path / "saved", folder, processor if given else None)
    assert AutoProcessor.from_pretrained(folder).segmentation == "sentence"


def test_long_texts_are_cut_or_refused(make):
    processor, text = make(max_segments=2), "a b c d e f g h i"
    with pytest.raises(ValueError, match="has 3 segments of 5 tokens, the model takes 2: say truncation=True"):
        processor(text)
    assert words(processor, processor(text, truncation=True)["input_ids"]) == "<s> a b c d <s> e f g h"


def test_what_it_cannot_do(make, tokenizer):
    with pytest.raises(ValueError, match="'chapter' is unknown; there are fixed, sentence, paragraph"):
        make(segmentation="chapter")
    with pytest.raises(ValueError, match="a leader and a token are two"):
        make(segment_length=1)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>")
    with pytest.raises(ValueError, match="no cls_token, and no bos_token"):
        ROW.load("Processor")(bare)


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_of_segments_go_with_them(make, tokenizer, side, monkeypatch):
    monkeypatch.setattr(tokenizer, "padding_side", side)
    processor, texts = make(), [["a", "b c d e f", "g"], ["h"]]
    batch = processor(texts, padding=True, return_tensors="pt", segment_labels=[[0, 1, 0], [1]])
    assert batch["labels"].tolist() == [[0, 1, -100, 0], [1, -100, -100, -100]]
    model = Case(ROW, "ForSegmentClassification").build()
    assert model(**batch).logits.shape == (2, 4, 2)
    rows = [
        dict(processor([text], segment_labels=[label])) for text, label in zip(texts, [[0, 1, 0], [1]], strict=True)
    ]
    rows = [{name: value[0] for name, value in row.items()} for row in rows]
    for name, tensor in DataCollatorWithPadding(processor)(rows).items():
        assert torch.equal(batch[name], tensor)
    with pytest.raises(ValueError, match="lists of segments, one for each"):
        processor(texts, segment_labels=[[0], [1]])
