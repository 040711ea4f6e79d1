"""A question at the end of a manual of 32,768 tokens: `python examples/long_reading.py [--text FILE...]`.

Somewhere in a stretch of Python's manual, or of your files, stands a note: a mark, and three of sixteen letters. (The
notes are generated, of tokens of their own, and put in at random places.) At the end stands the mark again: which were
the letters? Models learn this from texts in which a note comes again and again, at first of 64 tokens, then of 256 and
of 1,024, and are asked after ever longer ones, read in pieces through the cache: one of a recurrence and attention,
whose memory grows with the text; one of recurrences alone, whose memory does not, so that it has to learn what to let
in. Beside them: the same when they see the end of the text and no more.
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
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 32768, "initializer_range": 0.1}
SLOW = {"time_step_min": 1e-6, "time_step_max": 1e-5, "time_step_floor": 1e-7}  # a memory that forgets in 100,000s
READERS = {
    "recurrence and attention": ("hybrid", {"layer_types": ["ssd", "full_attention"], "position_type": "none"}),
    "recurrences": ("ssd", {"num_attention_heads": 4, "state_size": 64} | SLOW),
}
MARK, LETTERS, WRITTEN = "<note>", [f"<{letter}>" for letter in "abcdefghijklmnop"], 3  # letters of a note
LESSONS = {64: (1.0, 1e-2), 256: (0.25, 5e-3), 1024: (0.5, 5e-3)}  # tokens of a text: share of the steps, rate
Answer = tuple[float, int]  # the share of the letters that are right, and the bytes held
PIECE, END = 1024, 64  # tokens: of a step of training or of what is read at once; of what is seen of the end
LENGTHS, TEXTS = (64, 1024, 4096, 32768), 8  # that are asked about, and of each how many


class Notes(Dataset):
    """Texts of `length` tokens: a stretch of `stream` with a note in it, and the note again at the end, whose letters
    are asked; or `repeated`, to learn from, with the note wherever it fits, and asked each time but the first."""

    def __init__(self, stream: Stream, tokenizer: PreTrainedTokenizerBase, length: int, count: int, repeated: bool):
        self.length, self.count, self.repeated = length, count, repeated
        self.text = stream.tokens.tolist()
        self.text *= -(-length // len(self.text)) + 1  # a shorter one is read again
        self.mark, *self.letters = tokenizer.convert_tokens_to_ids([MARK, *LETTERS])

    def __len__(self) -> int:
        return self.count

    def distances(self, draw: random.Random) -> list[int]:
        """How many tokens of text stand before each note."""
        size, rest = WRITTEN + 1, self.length - 2 * (WRITTEN + 1)
        if not self.repeated:
            first = draw.randrange(rest + 1)
            return [first, rest - first]
        found, room = [], self.length - size
        while (near := int((rest + 1) ** draw.random()) - 1) + size <= room:  # any order of magnitude as often
            found.append(near)
            room -= near + size
        return [room, *found]

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        draw = random.Random(f"{self.repeated} {index}")
        letters = draw.choices(self.letters, k=WRITTEN)
        place = draw.randrange(len(self.text) - self.length)
        tokens, labels = [], []
        for number, distance in enumerate(self.distances(draw)):
            tokens += [*self.text[place : place + distance], self.mark, *letters]
            labels += [-100] * (distance + 1) + (letters if number else [-100] * WRITTEN)
            place += distance
        return {"input_ids": tokens, "labels": labels}


def learned(name: str, stream: Stream, tokenizer: PreTrainedTokenizerBase, steps: int, **options) -> PreTrainedModel:
    torch.manual_seed(0)
    row, fields = READERS[name]
    config = hf_arch.find(row).load("Config")(**SIZES | fields, bos_token_id=None, eos_token_id=None)
    model = hf_arch.find(row).load("ForCausalLM")(config)
    told = {"lr_scheduler_type": "cosine", "warmup_steps": 0.2, "weight_decay": 0.0, "logging_steps": 50}
    told |= {"save_strategy": "no", "report_to": []}
    for length, (share, rate) in LESSONS.items():
        told |= {"per_device_train_batch_size": PIECE // length, "max_steps": max(1, round(share * steps))}
        texts = Notes(stream, tokenizer, length, 10**6, repeated=True)
        with TemporaryDirectory() as folder:
            arguments = TrainingArguments(folder, learning_rate=rate, **told | options)
            Trainer(model, arguments, train_dataset=texts).train()
    return model.eval()


def answered(model: PreTrainedModel, texts: Notes, seen: int | None = None) -> Answer:
    """The share of the letters that are right, and the bytes that the model holds of a text, or of the last tokens that
    are `seen` of it."""
    rows = torch.tensor([text["input_ids"][-(seen or texts.length) :] for text in texts])
    reader = Reader(model, PIECE)
    right = reader.read(rows, last=WRITTEN).right
    return right.float().mean().item(), hf_arch.state_bytes(reader.memory(rows[:1]))


def main(
    files: list[str], lengths: tuple[int, ...] = LENGTHS, steps: int = 250, **options
) -> dict[str, list[tuple[float, int]]]:
    """Of each reader the share of right letters after texts of each length, and the bytes held of them."""
    corpus = split("your text", read_files(files)) if files else split("the manual", python_manual())
    tokenizer = train_tokenizer(corpus.train, SIZES["vocab_size"] - 1 - len(LETTERS))
    tokenizer.add_tokens([MARK, *LETTERS], special_tokens=True)
    train, held_out = (Stream.of(part, tokenizer) for part in (corpus.train, corpus.held_out))
    tests = [Notes(held_out, tokenizer, length, TEXTS, repeated=False) for length in lengths]
    found = {}
    for name in READERS:
        model = learned(name, train, tokenizer, steps, **options)
        found[name] = [answered(model, texts) for texts in tests]
        found[f"{name}, the end"] = [answered(model, texts, END) for texts in tests]
    print(f"{'right letters after':36}", *(f"{length:>13,} tokens" for length in lengths))
    for name, of_lengths in found.items():
        print(f"{name:36}", *(f"{share:7.0%} {held / 1024:8.0f} KiB" for share, held in of_lengths))
    print(f"{'guessing':36} {1 / len(tests[0].letters):7.0%}. KiB are what is held of the text.")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="of the texts, in tokens")
    parser.add_argument("--steps", type=int, default=250, help="with the shortest texts")
    told = parser.parse_args()
    main(told.text, tuple(told.lengths), told.steps)
