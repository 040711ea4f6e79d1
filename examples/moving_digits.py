"""What is moving, and where to? HAT reads short videos, frame by frame and then across frames: `python
examples/moving_digits.py [STEPS]` (pip install -e ".[examples]").

A video is one of scikit-learn's handwritten digits, 8 x 8 pixels, that crosses a field of 16 x 16 in five frames: to
the right, to the left, down or up. A frame is a segment of patches, a video a document of frames. The model says digit
and direction, of digits that it has not seen, beside a logistic regression on the mean of the frames: in which a digit
that goes to the right looks like one that goes to the left.
"""

import sys
import tempfile

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from transformers import Trainer, TrainingArguments, ViTImageProcessorPil

import hf_arch

FRAMES, FIELD, STEP = 5, 16, 2
DIRECTIONS = ("right", "left", "down", "up")


def moving(image: np.ndarray, direction: int, aside: int) -> np.ndarray:
    """[frames, 1, height, width] of a digit [8, 8] that crosses the field, `aside` steps from its edge."""
    video = np.zeros((FRAMES, 1, FIELD, FIELD), dtype=np.uint8)
    for number, frame in enumerate(video[:, 0]):
        along = number if direction % 2 == 0 else FRAMES - 1 - number
        top, left = (STEP * place for place in ((aside, along) if direction < 2 else (along, aside)))
        frame[top : top + 8, left : left + 8] = image
    return video


def videos_of(images: np.ndarray, digits: np.ndarray, count: int, seed: int) -> list[dict]:
    """`count` videos, each with a label, digit * 4 + direction."""
    draw = np.random.default_rng(seed)
    drawn = zip(draw.integers(len(images), size=count), draw.integers(4, size=count), strict=True)
    return [
        {"video": moving(images[which], way, draw.integers(FRAMES)), "label": digits[which] * 4 + way}
        for which, way in drawn
    ]


def model_and_processor():
    row, tokenizer = hf_arch.find("hat"), hf_arch.byte_tokenizer()
    tokenizer.add_tokens("<video>", special_tokens=True)
    reader = ViTImageProcessorPil(size={"height": FIELD, "width": FIELD}, do_normalize=False)
    processor = row.load("Processor")(tokenizer, reader, segment_length=17, max_segments=FRAMES, patch_size=4)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"layer_types": ["level_0", "level_0", "level_1", "level_1"], "initializer_range": 0.1}
    sizes |= {"segment_lengths": [17], "max_position_embeddings": 17 * FRAMES}
    pixels = {"image_size": FIELD, "patch_size": 4, "num_channels": 1}
    pixels |= {"video_token_id": processor.placeholders["video"], "num_labels": 10 * len(DIRECTIONS)}
    config = row.load("Config")(vocab_size=len(tokenizer), pad_token_id=255, **sizes, **pixels)
    return row.load("ForSequenceClassification")(config), processor


def train(model, processor, items: list[dict], steps: int) -> None:
    def collate(items):
        told = processor(videos=[item["video"] for item in items], return_tensors="pt")
        return dict(told) | {"labels": torch.tensor([item["label"] for item in items])}

    with tempfile.TemporaryDirectory() as folder:
        told = {"per_device_train_batch_size": 32, "learning_rate": 1e-3, "lr_scheduler_type": "cosine"}
        told |= {"warmup_steps": 40, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 100}
        arguments = TrainingArguments(folder, max_steps=steps, remove_unused_columns=False, **told)
        Trainer(model, arguments, data_collator=collate, train_dataset=items).train()


@torch.no_grad()
def named(model, processor, items: list[dict]) -> np.ndarray:
    told = processor(videos=[item["video"] for item in items], return_tensors="pt")
    return model.eval()(**told).logits.argmax(dim=-1).numpy()


def mean_frames(items: list[dict]) -> np.ndarray:
    return np.stack([item["video"].mean(0).ravel() / 255 for item in items])


def main(steps: int = 800, count: int = 400) -> dict[str, list[float]]:
    """Of each way to tell, on `count` held-out videos, the shares in which digit, direction and both are right."""
    torch.manual_seed(0)
    data = load_digits()
    images = np.uint8(data.images * 255 / 16)
    seen, held_out, digits, others = train_test_split(images, data.target, test_size=360, random_state=0)
    learn, ask = videos_of(seen, digits, 32 * steps, 1), videos_of(held_out, others, count, 2)
    model, processor = model_and_processor()
    train(model, processor, learn, steps)
    some = learn[:4000]
    beside = LogisticRegression(max_iter=200).fit(mean_frames(some), [item["label"] for item in some])
    found = {
        "HAT": named(model, processor, ask),
        "logistic regression on mean frames": beside.predict(mean_frames(ask)),
    }
    wanted = np.array([item["label"] for item in ask])
    shares = {}
    for name, guess in found.items():
        right = guess // 4 == wanted // 4, guess % 4 == wanted % 4, guess == wanted
        shares[name] = [float(each.mean()) for each in right]
    return shares


if __name__ == "__main__":
    for name, (digit, way, both) in main(*map(int, sys.argv[1:])).items():
        print(f"{name}: digit {digit:.1%}, direction {way:.1%}, both {both:.1%}")
    print("chance: digit 10 %, direction 25 %, both 2.5 %")
