"""A question at the end of a manual of 32,768 tokens: `python examples/long_reading.py [--text FILE...]`.

Between the lines of Python's manual, or of your files, stand a few notes, "Remember: <word> is <word>."; they are
generated, of words of the text. At its end they are asked for. Models learn this from texts of 192 tokens, and are
asked after ever longer ones, read in pieces through the cache: one that looks up the blocks of the text that suit its
question, of a memory that grows; a recurrent one, whose memory does not; and one that sees a window and no more.
"""

import argparse
import random
from tempfile import TemporaryDirectory

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

import hf_arch
from hf_arch.demo.text import python_manual, read_files, split
from hf_arch.demo.tokens import Stream, train_tokenizer
from hf_arch.evaluate.reading import Reader

SIZES = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 32768}
WINDOW = {"position_type": "rope", "sliding_window": 32}
LOOKS_UP = {"layer_types": ["sliding_attention", "retrieval_attention"], "retrieval_block_size": 16}
READERS = {
    "looks up": ("sparse_transformer", WINDOW | LOOKS_UP | {"retrieved_blocks": 4}),
    "recurrent": ("ssd", {"state_size": 64}),
    "window": ("sparse_transformer", WINDOW | {"layer_types": ["sliding_attention"] * 2}),
}
NOTES, LENGTH, PIECE = 4, 192, 1024  # notes of a text; tokens of one to learn from; tokens that are read at once
LENGTHS, TEXTS = (192, 1024, 4096, 32768), 16  # that are asked about, and of each how many


class Notes(Dataset):
    """Texts of `length` tokens: a stretch of `stream`, notes in it, and the notes again, whose last words are asked."""

    def __init__(self, stream: Stream, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int):
        self.text, self.length, self.count, self.seed = stream.tokens.tolist(), length, count, seed
        self.before, self.between, self.after = (tokenizer(part)["input_ids"] for part in ("\nRemember:", " is", ".\n"))
        vocabulary = {token: word for word, token in tokenizer.get_vocab().items()}
        words = [
            token for token in sorted(vocabulary) if vocabulary[token][0] == "Ġ" and vocabulary[token][1:].isalpha()
        ]
        self.names, self.values = words[0:128:2], words[1:129:2]
        self.text *= -(-length // len(self.text)) + 1  # a shorter text is read again

    def __len__(self) -> int:
        return self.count

    def note(self, name: int, value: int) -> list[int]:
        return [*self.before, name, *self.between, value, *self.after]

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        draw = random.Random(f"{self.seed} {index}")
        told = list(zip(draw.sample(self.names, NOTES), draw.choices(self.values, k=NOTES), strict=True))
        notes = [self.note(*pair) for pair in told]
        asked = [token for pair in draw.sample(told, NOTES) for token in self.note(*pair)]
        room = self.length - 2 * len(asked)
        start = draw.randrange(len(self.text) - room)
        places = [0, *sorted(draw.randrange(room + 1) for _ in notes), room]
        parts = [self.text[start + a : start + b] for a, b in zip(places[:-1], places[1:], strict=True)]
        tokens = [token for part, note in zip(parts, [*notes, []], strict=True) for token in part + note] + asked
        size = len(asked) // NOTES
        wanted = range(size - 1 - len(self.after), len(asked), size)
        labels = [token if place in wanted else -100 for place, token in enumerate(asked)]
        return {"input_ids": tokens, "labels": [-100] * (self.length - len(asked)) + labels}


def learned(name: str, texts: Notes, folder: str, **options) -> PreTrainedModel:
    torch.manual_seed(0)
    row, fields = READERS[name]
    config = hf_arch.find(row).load("Config")(**SIZES | fields, bos_token_id=None, eos_token_id=None)
    model = hf_arch.find(row).load("ForCausalLM")(config)
    told = {"learning_rate": 2e-3, "lr_scheduler_type": "cosine", "warmup_steps": 50, "logging_steps": 100}
    told |= {"per_device_train_batch_size": 16, "weight_decay": 0.0, "save_strategy": "no", "report_to": []}
    Trainer(model, TrainingArguments(folder, **told | options), train_dataset=texts).train()
    return model.eval()


def answered(model: PreTrainedModel, texts: Notes) -> tuple[float, int]:
    """The share of the answers that are right, and the bytes that the model holds of a text."""
    rows, labels = (torch.tensor([text[name] for text in texts]) for name in ("input_ids", "labels"))
    reader, last = Reader(model, PIECE), texts.length - int((labels[0] != -100).int().argmax())
    right = reader.read(rows, last=last).right[labels[:, -last:] != -100]
    return right.float().mean().item(), hf_arch.state_bytes(reader.memory(rows[:1]))


def main(files: list[str], lengths: tuple[int, ...] = LENGTHS, **options):
    """Of each reader the share of right answers after texts of each length, and the bytes held of them."""
    corpus = split("your text", read_files(files)) if files else split("the manual", python_manual())
    tokenizer = train_tokenizer(corpus.train, SIZES["vocab_size"])
    train, held_out = (Stream.of(part, tokenizer) for part in (corpus.train, corpus.held_out))
    tests = [Notes(held_out, tokenizer, length, TEXTS, seed=1) for length in lengths]
    found = {}
    with TemporaryDirectory() as folder:
        for name in READERS:
            model = learned(name, Notes(train, tokenizer, LENGTH, 10**6, seed=0), folder, **options)
            found[name] = [answered(model, texts) for texts in tests]
    print(f"{'right answers after':20}", *(f"{length:>13,} tokens" for length in lengths))
    for name, of_lengths in found.items():
        print(f"{name:20}", *(f"{share:7.0%} {held / 1024:8.0f} KiB" for share, held in of_lengths))
    values = tests[0].values
    print(f"{'guessing':20} {1 / len(values):7.0%}: one of {len(values)} words. KiB are what is held of the text.")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="of the texts, in tokens")
    parser.add_argument("--steps", type=int, default=500)
    told = parser.parse_args()
    main(told.text, tuple(told.lengths), max_steps=told.steps)
