"""A story that goes on for thousands of tokens, from a memory that does not grow: `python examples/story.py
[--architecture NAME] [--text FILE...]`; needs the extra `plots`.

A recurrent model and a Transformer of the same size learn windows of 128 tokens of Python's manual, or of your files.
Then held-out text is read far beyond that length: what does a byte cost at each position? Last, the recurrent model
writes on and on; its state, all that it holds of what was written, is saved, loaded, and gone on from twice.
"""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

import hf_arch
from hf_arch.demo.ngrams import NGram
from hf_arch.demo.text import python_manual, read_files, split
from hf_arch.demo.tokens import Stream, TokenizedCorpus, Windows, train_tokenizer
from hf_arch.evaluate.bits import AtPositions, Tokens, measure
from hf_arch.evaluate.reading import Reader
from hf_arch.publish import staged_file

SIZES = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "hidden_dropout": 0.1, "max_position_embeddings": 32768}
LENGTH, LONGEST, PIECE = 128, 4096, 256  # tokens: of training, of reading; that are read, and written, at once
Curves = dict[str, list[AtPositions]]


def learned(architecture: str, corpus: TokenizedCorpus, end: int, folder: Path, **options) -> PreTrainedModel:
    """A model of windows of LENGTH tokens."""
    torch.manual_seed(0)
    row = hf_arch.find(architecture)
    told = {"bos_token_id": end, "eos_token_id": end}
    model = row.load("ForCausalLM")(row.load("Config")(**SIZES, **told, **row.head_fields.get("ForCausalLM", {})))
    told = {"learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 25, "save_strategy": "no"}
    told |= {"per_device_train_batch_size": 8, "logging_steps": 100, "report_to": []}
    arguments = TrainingArguments(str(folder / "run"), **told | options)
    Trainer(model, arguments, train_dataset=Windows(corpus.train, LENGTH)).train()
    return model.eval()


def by_position(model: PreTrainedModel, stream: Stream, longest: int, windows: int = 4) -> list[AtPositions]:
    """Bits per byte by position in texts of `longest` tokens, read in pieces through the cache."""
    text = Tokens(torch.from_numpy(stream.tokens), stream.size)
    return measure(Reader(model, PIECE), text, [longest], windows)[0]


def go_on(model: PreTrainedModel, text: torch.Tensor, state, count: int):
    """`text` [1, length] with `count` more tokens, and the state after them."""
    told = {"max_new_tokens": count, "do_sample": True, "temperature": 0.8, "top_p": 0.95, "pad_token_id": 0}
    found = model.generate(text, past_key_values=state, eos_token_id=None, return_dict_in_generate=True, **told)
    return found.sequences, found.past_key_values


def write(model: PreTrainedModel, text: torch.Tensor, count: int, file: Path):
    """A story of `count` tokens, the bytes of the state after each PIECE of them, and two ways on from its file."""
    set_seed(0)
    state, held = None, []
    while len(held) * PIECE < count:
        text, state = go_on(model, text, state, PIECE)
        held.append(hf_arch.state_bytes(state))
    hf_arch.save_state(state, file, model)
    kept = hf_arch.load_state(file, model)
    return text, held, [go_on(model, text, hf_arch.fork(kept), 24)[0][0, text.shape[1] :] for _ in range(2)]


def draw(curves: Curves, trigram: float, path: Path) -> None:
    picture = Figure(figsize=(7, 4), dpi=130, layout="constrained")
    axes = picture.subplots()
    for name, positions in curves.items():
        axes.plot(
            [math.sqrt(at.first * at.last) for at in positions], [at.bits_per_byte for at in positions], label=name
        )
    axes.axhline(trigram, color="#b08968", linestyle=":", label="trigrams")
    axes.axvline(LENGTH, color="#6b7280", linestyle="--", linewidth=1, label="length in training")
    axes.set(xscale="log", xlabel="position, in tokens", title="bits per byte of held-out text, by position")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with staged_file(path) as stage:
        picture.savefig(stage, format="png")


def main(architecture: str, files: list[str], folder: Path, longest: int, new_tokens: int, **options) -> Curves:
    documents = split("your text", read_files(files)) if files else split("the manual", python_manual())
    tokenizer = train_tokenizer(documents.train, SIZES["vocab_size"])
    corpus = TokenizedCorpus.of(documents, tokenizer, longest)
    names = {"transformer": "a Transformer", architecture: hf_arch.find(architecture).title}
    models = {name: learned(row, corpus, tokenizer.eos_token_id, folder, **options) for row, name in names.items()}
    curves = {name: by_position(model, corpus.held_out, longest) for name, model in models.items()}
    counts = NGram(corpus.train.tokens, 3, SIZES["vocab_size"])
    trigram = corpus.held_out.figures(counts.loss(corpus.held_out.tokens)).bits_per_byte
    draw(curves, trigram, folder / "loss_by_position.png")

    print(f"{documents}.\nBits per byte of held-out text, by position; models learned windows of {LENGTH} tokens:")
    print(f"{'positions':>14}", *(f"{name:>16}" for name in curves))
    for at in zip(*curves.values(), strict=True):
        print(f"{at[0].first:>6} - {at[0].last:<5}", *(f"{each.bits_per_byte:16.2f}" for each in at))
    print(f"{'all':>14}  {trigram:.2f} by trigrams of the same tokens")
    model = models[names[architecture]]
    prompt = torch.from_numpy(corpus.held_out.tokens[None, :8])
    text, held, ends = write(model, prompt, new_tokens, folder / "story.state")
    for tokens in (PIECE, text.shape[1]):
        caches = (Reader(each, PIECE).memory(text[:, :tokens]) for each in models.values())
        sizes = (f"{hf_arch.state_bytes(cache) / 1024:.0f} KiB" for cache in caches)
        print(f"of {tokens:5} tokens:", *(f"{size} held by {name}" for size, name in zip(sizes, models, strict=True)))
    print(f"{text.shape[1]} tokens of a story; its state took {min(held):,} to {max(held):,} bytes. It ends")
    print(f"  ... {tokenizer.decode(text[0, -40:])!r}\nand went on, from the file of its state, twice:")
    print(*(f"  {tokenizer.decode(end)!r}" for end in ends), f"Written to {folder}/", sep="\n")
    return curves


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[2])
    parser.add_argument("--architecture", default="retnet", help="any row with a bounded state")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--longest", type=int, default=LONGEST, help="how far held-out text is read, in tokens")
    parser.add_argument("--new-tokens", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=Path("hf_arch_story"))
    told = parser.parse_args()
    main(told.architecture, told.text, told.output, told.longest, told.new_tokens, max_steps=told.steps)
