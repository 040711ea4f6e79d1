"""The processor of HAT with images and videos: where they go in a text, and that it comes back with its model."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_hat_processor import words
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import (
    AutoProcessor,
    BatchFeature,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    TrainingArguments,
    ViTImageProcessorPil,
    processing_utils,
)
from transformers.video_processing_utils import VideoProcessorMixin

from hf_arch import ContrastiveCollator, ContrastiveTrainer, SentenceMaskCollator, embed, export, find
from hf_arch.modeling.hierarchical.processing_pixels import LOADS
from promises import EXACT, Case

ROW = find("hat")
IMAGE, VIDEO = 94, 95
PIXELS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "image_size": 6, "patch_size": 3, "num_channels": 1}


@pytest.fixture(scope="module")
def reader():
    """A tokenizer of 96 tokens."""
    special = ["<pad>", "<s>", "</s>", "<mask>", "<unk>"]
    known = [*special, *"abcdefghijklmnopqrstuvwxyz.", *(f"<{i}>" for i in range(62)), "<image>", "<video>"]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    named = {"pad_token": "<pad>", "cls_token": "<s>", "mask_token": "<mask>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **named, extra_special_tokens={"image_token": "<image>"})


@pytest.fixture
def seeing(reader):
    def make(**fields):
        images = ViTImageProcessorPil(size={"height": 6, "width": 6}, do_normalize=False, do_convert_rgb=False)
        told = {"segment_length": 6, "max_segments": 16, "patch_size": 3, "image_processor": images} | fields
        return ROW.load("Processor")(reader, **told)

    return make


def array(number: int, *frames: int) -> np.ndarray:
    """An image of one shade of gray, or a video."""
    return np.full((*frames, 1, 6, 6), number, dtype=np.uint8)


def shades(pixels) -> list:
    """Of each image [..., channels, height, width] the shade."""
    return np.rint(np.asarray(pixels)[..., 0, 0, 0] * 255).astype(int).tolist()


def test_images_and_videos_are_segments(seeing):
    found = seeing()("a b <image> c <video> <image> d", images=[array(1), array(2)], videos=[array(9, 2)])
    assert words(seeing(), found["input_ids"]) == (
        "<s> a b <s> <image> <image> <image> <image> <s> c <s> <video> <video> <video> <video> "
        "<s> <video> <video> <video> <video> <s> <image> <image> <image> <image> <s> d"
    )
    starts = [mark for mark in found["segment_starts"] if mark]
    assert starts == [1, 1, 1, 2, 1, 2, 1]  # the video, and what follows it, begins a segment of segments
    assert len(found["segment_starts"]) == len(found["attention_mask"]) == len(found["input_ids"])
    assert shades(found["pixel_values"]) == [1, 2] and shades(found["pixel_values_videos"]) == [[9, 9]]


def test_a_text_is_the_list_of_its_segments(seeing):
    processor = seeing()
    expected = processor("a <image> b <video>", images=array(1), videos=array(9, 2))
    gray = [Image.fromarray(np.full((7, 7), 9, dtype=np.uint8))] * 2
    for video in (array(9, 2), list(array(9, 2))):
        found = processor([["a", array(1), "b", video]])
        assert all(np.array_equal(found[name][0], expected[name]) for name in ("input_ids", "segment_starts"))
        assert shades(found["pixel_values_videos"]) == [[9, 9]]
    assert processor([[gray]])["pixel_values_videos"].shape == (1, 2, 1, 6, 6)  # resized
    labelled = processor([["a", array(1), array(9, 2), "b c d e f g"]], segment_labels=[[0, 1, 2, 3]])
    assert labelled["labels"] == [[0, 1, 2, -100, 3, -100]]


def test_without_text_each_is_a_text(seeing):
    processor = seeing()
    both = processor(images=[array(1), array(2)], return_tensors="pt")
    assert both["input_ids"].tolist() == [[1] + [IMAGE] * 4] * 2 and both["pixel_values"].shape == (2, 1, 6, 6)
    assert shades(processor(images=[[array(1)], [array(2)]])["pixel_values"]) == [1, 2]
    videos = processor(videos=[array(1, 2), array(2, 3)], padding=True, return_tensors="pt")
    assert videos["pixel_values_videos"].shape == (5, 1, 6, 6)  # of different lengths: frame after frame
    assert (videos["input_ids"] == VIDEO).sum(1).tolist() == [8, 12]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_says_what_its_texts_say_alone(seeing, reader, side, monkeypatch):
    monkeypatch.setattr(reader, "padding_side", side)
    processor, model = seeing(segmentation="sentence"), Case(ROW, "Model").build(**PIXELS, segment_lengths=[6])
    texts = [["a", array(1), array(2, 2)], "b c . d", [array(3), array(4, 1), "e"], array(5)]
    batch = processor(texts, padding=True, return_tensors="pt")
    rows = [{name: values[0] for name, values in processor([text]).items() if name not in PIXELS} for text in texts]
    for row, text in zip(rows, texts, strict=True):
        row |= {name: value for name, value in processor([text]).items() if name.startswith("pixel")}
    rows[0]["pixel_values"] = rows[0]["pixel_values"].tolist()  # as a data set keeps them
    for name, tensor in DataCollatorWithPadding(processor)(rows).items():
        assert torch.equal(batch[name], tensor)
    with torch.no_grad():
        together = model(**batch).pooler_output
        for text, expected in zip(texts, together, strict=True):
            assert_close(model(**processor([text], return_tensors="pt")).pooler_output[0], expected, **EXACT)


def test_a_cut_text_keeps_the_pixels_that_it_says(seeing):
    found = seeing(max_segments=4)(
        "<image> <video> <image>", images=[array(1), array(2)], videos=[array(9, 5)], truncation=True
    )
    assert shades(found["pixel_values"]) == [1] and shades(found["pixel_values_videos"]) == [[9] * 3]
    assert found["input_ids"].count(VIDEO) == 12


class Flips(VideoProcessorMixin):
    """One that needs no torchvision: the frames the other way round."""

    def preprocess(self, videos, **kwargs):
        return BatchFeature({"pixel_values_videos": [video[::-1] / 255 for video in videos]})


@pytest.mark.parametrize("parts", ["text", "image", "both"])
def test_it_is_saved_and_loaded_with_what_it_has(seeing, tmp_path, parts, monkeypatch):
    # As where torchvision is installed, which video processors of transformers' own ask for
    monkeypatch.setattr(processing_utils.transformers_module, "VideoProcessorMixin", VideoProcessorMixin, raising=False)
    monkeypatch.setitem(LOADS, "video_processor", Flips)
    own = {"text": {"image_processor": None}, "image": {}, "both": {"video_processor": Flips()}}[parts]
    processor = seeing(**own)
    processor.save_pretrained(tmp_path)
    Case(ROW, "Model").build().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert ("image_processor" in saved) == (parts != "text") and ("video_processor" in saved) == (parts == "both")
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor) and loaded.to_dict() == processor.to_dict()
    assert repr(loaded) and loaded.model_input_names == processor.model_input_names
    told = {} if parts == "text" else {"images": [array(1)], "videos": [np.stack([array(2), array(3)])]}
    text = "a <image> <video>" if told else "a b"
    for name, values in loaded(text, **told).items():
        assert np.array_equal(values, processor(text, **told)[name])
    if told:
        expected = [[3, 2]] if parts == "both" else [[2, 3]]
        assert shades(loaded(text, **told)["pixel_values_videos"]) == expected


def test_what_was_saved_before_there_were_pictures_loads(seeing, tmp_path):
    seeing(image_processor=None).save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    names = ("segmentation", "segment_length", "max_segments", "processor_class")
    path.write_text(json.dumps({name: json.loads(path.read_text())[name] for name in names}))
    loaded = ROW.load("Processor").from_pretrained(tmp_path)
    assert loaded.segment_length == 6 and loaded.model_input_names == ["input_ids", "attention_mask", "segment_starts"]
    assert loaded("a <image>")["input_ids"] == [1, 5, IMAGE]  # a token like others


ALONE = """
import sys
sys.modules["hf_arch"] = None  # any import of the package fails
import numpy as np
from transformers import AutoModel, AutoProcessor
processor = AutoProcessor.from_pretrained(".", trust_remote_code=True)
told = processor(["a . b <image>"], images=np.full((1, 6, 6), 7, dtype=np.uint8), return_tensors="pt")
model = AutoModel.from_pretrained(".", trust_remote_code=True)
print(told["segment_starts"].tolist(), model(**told).pooler_output.double().sum().item())
"""


def test_an_exported_folder_reads_images(seeing, tmp_path):
    model, processor = Case(ROW, "Model").build(torch.float32, **PIXELS), seeing(segmentation="paragraph")
    export(model, tmp_path / "exported", processor)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ALONE]
    run = subprocess.run(command, cwd=tmp_path / "exported", env=environment, capture_output=True, text=True)
    assert run.stdout.startswith("[[1, 0, 0, 0, 1, 0, 0, 0, 0]]"), run.stderr
    told = processor(["a . b <image>"], images=array(7), return_tensors="pt")
    found = float(run.stdout.split("\n")[0].rpartition(" ")[2])
    assert abs(found - model(**told).pooler_output.double().sum().item()) < 1e-4


def test_a_dialogue_shows_images(seeing):
    processor, model = seeing(), Case(ROW, "Model").build(**PIXELS, layer_types=["level_0", "level_0", "level_1"])
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": array(1)}]},
        {"role": "assistant", "content": "b c"},
        {"role": "user", "content": [{"type": "video", "video": array(2, 2)}, {"type": "text", "text": "d"}]},
    ]
    state = None
    for number in range(1, 4):
        turn = processor.dialogue(talk[:number], since=number - 1, padding=True, return_tensors="pt")
        turn.pop("token_type_ids")
        found, state = model.read_turn(state, **turn)
    whole = processor.dialogue([talk], return_tensors="pt")
    assert [mark for mark in whole["segment_starts"][0].tolist() if mark] == [2, 1, 2, 2, 1, 2]
    whole.pop("token_type_ids")
    assert_close(found.pooler_output, model(**whole).pooler_output, **EXACT)


def test_what_it_cannot_read(seeing, reader):
    processor = seeing()
    with pytest.raises(ValueError, match="Texts say <image> more often than there are images"):
        processor("<image> <image>", images=array(1))
    with pytest.raises(ValueError, match="There are 1 more images than texts say <image>"):
        processor("a", images=array(1))
    with pytest.raises(ValueError, match="has no image_processor"):
        seeing(image_processor=None)([array(1)])
    with pytest.raises(ValueError, match="clip.mp4 is an address: the processor has no video_processor"):
        processor("<video>", videos="clip.mp4")
    with pytest.raises(ValueError, match="Images of 6 x 6 pixels are not patches of 4 x 4"):
        seeing(patch_size=4)([array(1)])
    with pytest.raises(ValueError, match="fit into a segment of 4 with its leader"):
        seeing(segment_length=4)([array(1)])
    with pytest.raises(ValueError, match="<frame> is no token of the tokenizer"):
        seeing(video_token="<frame>")([array(1, 2)])
    with pytest.raises(ValueError, match="has 3 segments of 6 tokens, the model takes 2"):
        seeing(max_segments=2)([["a", array(1), "b"]])


def test_images_are_never_hidden(seeing):
    torch.manual_seed(0)
    processor = seeing()
    texts = [["a b c", array(1), "d e", array(2, 2), "f"], [array(3), "g h"], ["i j", "k l m"]] * 20
    items = [
        {name: values[0] if name.startswith(("input", "att", "seg")) else values for name, values in one.items()}
        for one in (processor([text]) for text in texts)
    ]
    batch = SentenceMaskCollator(processor, mlm_probability=0.5, sentence_probability=0.5)(items)
    pixels = (batch["original_ids"] == IMAGE) | (batch["original_ids"] == VIDEO)
    assert torch.equal((batch["input_ids"] == IMAGE) | (batch["input_ids"] == VIDEO), pixels)
    assert (batch["labels"][pixels] == -100).all() and (batch["labels"] != -100).any()
    counts = batch["hidden_segments"].sum(1)
    assert (
        (counts[0::3] >= 1).all()
        and (counts[0::3] <= 2).all()
        and (counts[1::3] == 0).all()
        and (counts[2::3] == 1).all()
    )
    model = Case(ROW, "ForPreTraining").build(torch.float32, **PIXELS)
    assert model(**batch).loss.isfinite()


def test_images_and_captions_are_brought_together(seeing, tmp_path):
    torch.manual_seed(0)
    processor, model = seeing(), ROW.load("Model")(ROW.tiny_config("Model", **PIXELS, segment_lengths=[6]))
    pairs = [{"query": array(30 * i), "positive": f"{a} {a}"} for i, a in enumerate("abcdefgh")]
    told = {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "report_to": [], "save_strategy": "no"}
    trainer = ContrastiveTrainer(
        model,
        TrainingArguments(str(tmp_path), **told, remove_unused_columns=False, max_steps=40),
        data_collator=ContrastiveCollator(processor, prefixes={"positive": "z "}),
        train_dataset=pairs,
        eval_dataset=pairs,
        processing_class=processor,
    )
    before = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_recall_at_1"] > max(0.8, before["eval_recall_at_1"])
    trainer.save_model(str(tmp_path / "saved"))
    assert AutoProcessor.from_pretrained(tmp_path / "saved").image_processor is not None
    with torch.no_grad():
        vectors = embed(model, processor(["a", array(30)], padding=True, return_tensors="pt"))
    assert vectors.shape == (2, 32)
