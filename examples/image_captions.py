"""Which caption is this picture's? HAT reads images and captions into one space, in which those that belong together
are near: `python examples/image_captions.py [EPOCHS]` (pip install -e ".[examples]").

The images are scikit-learn's handwritten digits, 8 x 8 pixels; an image is a segment of patches, a caption one of
bytes. The same model reads both, and learns from pairs alone (InfoNCE, as in CLIP: Radford et al., 2021,
arXiv:2103.00020). It is asked for the caption, of ten, of images that it has not seen, and stands beside a logistic
regression on the pixels, which is told the number of each digit.
"""

import sys
import tempfile

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from transformers import TrainingArguments, ViTImageProcessorPil

import hf_arch

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = [f"a handwritten {number}" for number in NUMBERS]


def images_and_digits():
    """Images [1, 8, 8] and their digits, to learn from and held out."""
    digits = load_digits()
    images = np.uint8(digits.images[:, None] * 255 / 16)
    return train_test_split(images, digits.target, test_size=360, random_state=0, stratify=digits.target)


def model_and_processor():
    row, tokenizer = hf_arch.find("hat"), hf_arch.byte_tokenizer()
    tokenizer.add_tokens("<image>", special_tokens=True)
    reader = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=0.5, image_std=0.5)
    processor = row.load("Processor")(tokenizer, reader, segment_length=32, max_segments=4, patch_size=4)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"initializer_range": 0.1, "segment_lengths": [32], "max_position_embeddings": 128}
    pixels = {"image_size": 8, "patch_size": 4, "num_channels": 1, "image_token_id": processor.placeholders["image"]}
    config = row.load("Config")(vocab_size=len(tokenizer), pad_token_id=255, **sizes, **pixels)
    return row.load("Model")(config), processor


def train(model, processor, images, digits, epochs: float) -> None:
    pairs = [{"query": image, "positive": CAPTIONS[digit]} for image, digit in zip(images, digits, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        told = {"per_device_train_batch_size": 64, "learning_rate": 1e-3, "lr_scheduler_type": "cosine"}
        told |= {"warmup_steps": 40, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 100}
        arguments = TrainingArguments(folder, num_train_epochs=epochs, remove_unused_columns=False, **told)
        collator = hf_arch.ContrastiveCollator(processor)
        hf_arch.ContrastiveTrainer(model, arguments, data_collator=collator, train_dataset=pairs).train()


def chosen(model, processor, images) -> np.ndarray:
    """The number of the caption that is nearest to each image."""
    captions, pictures = (hf_arch.embed_texts(model, processor, told) for told in (CAPTIONS, list(images)))
    return (pictures @ captions.T).argmax(dim=1).numpy()


def main(epochs: float = 15) -> tuple[float, float]:
    """Shares of held-out images whose caption, and whose digit by the pixels, is found."""
    torch.manual_seed(0)
    seen, held_out, digits, wanted = images_and_digits()
    model, processor = model_and_processor()
    train(model, processor, seen, digits, epochs)
    found = chosen(model, processor, held_out)
    beside = LogisticRegression(max_iter=1000).fit(seen.reshape(len(seen), -1) / 255, digits)
    return (found == wanted).mean(), beside.score(held_out.reshape(len(held_out), -1) / 255, wanted)


if __name__ == "__main__":
    ours, pixels = main(*map(float, sys.argv[1:]))
    print(f"the caption of ten, of images not seen before: {ours:.1%}")
    print(f"logistic regression on the pixels: {pixels:.1%}; chance: 10 %")
