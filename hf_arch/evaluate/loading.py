"""The model, its tokenizer and the text; what does not fit together is named before anything is measured."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_arch.demo.text import read_files
from hf_arch.evaluate.bits import Tokens

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
POSITION_TABLE = re.compile(r"(^|\.)(wpe|\w*position\w*)$")


def load_model(source: str, device: str = "cpu", dtype: str = "float32", trust_remote_code: bool = False):
    """The causal language model in a folder or on the Hub. Raises ValueError where there is another one."""
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this machine has no GPU that torch can use.")
    if not isinstance(getattr(torch, dtype, None), torch.dtype) or not getattr(torch, dtype).is_floating_point:
        raise ValueError(f"--dtype {dtype} is no floating-point type of torch: try float32 or bfloat16.")
    if Path(source).is_dir() and not Path(source, "config.json").exists():
        raise ValueError(f"{source} holds no model: there is no config.json.")
    told = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code, "output_loading_info": True}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(source, **told)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(f"{source} is no causal language model: transformers knows no such head for it.") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{source} is no causal language model: it has no weights for {', '.join(missing[:3])}.")
    return model.to(device).eval()


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    missing = (
        f"{source} holds no tokenizer: put one there with `tokenizer.save_pretrained({source!r})`, or name where one "
        "is by --tokenizer."
    )
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise ValueError(missing)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{missing} ({error})") from error


def tokenize(tokenizer: PreTrainedTokenizerBase, paths: Sequence[str | Path]) -> Tokens:
    """The files, one after another, as one text."""
    text = "\n\n".join(document.text for document in read_files(paths))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    first = tokenizer("a")["input_ids"][:1]
    prefix = tuple(first) if first and first[0] == tokenizer.bos_token_id else ()
    return Tokens(torch.tensor(ids), len(text.encode()), prefix)


def check_fit(model: PreTrainedModel, text: Tokens) -> None:
    """Raises ValueError where the tokenizer is of another model."""
    vocabulary, highest = model.get_input_embeddings().weight.shape[0], int(text.ids.max())
    if highest >= vocabulary:
        raise ValueError(
            f"The tokenizer names token {highest:,}, but the model knows {vocabulary:,}: it belongs to another model."
        )


def learned_positions(model: nn.Module) -> int | None:
    """How many positions the model has learned, where it has learned a table of them."""
    sizes = [
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and POSITION_TABLE.search(name)
    ]
    if not sizes:
        return None
    stated = getattr(model.config, "max_position_embeddings", None) or sizes[0]
    return min(*sizes, stated)  # some tables have rows to spare, for padding


def choose_lengths(lengths: Sequence[int], model: nn.Module, text: Tokens) -> list[int]:
    """The user's lengths, or, where there are none, a quarter of the trained length to four times as much, as far as
    text and positions go. Raises ValueError for lengths that cannot be measured."""
    table, tokens = learned_positions(model), len(text.ids)
    trained = getattr(model.config, "max_position_embeddings", None) or 2048
    chosen = sorted(set(lengths))
    if not chosen:
        chosen = [trained * 2**power // 4 for power in range(5)]
        chosen = [length for length in chosen if 32 <= length <= min(tokens, table or tokens)]
        if not chosen:
            raise ValueError(f"The text has {tokens:,} tokens: give a longer one, or --lengths that fit.")
    if chosen[0] < 32:
        raise ValueError("--lengths are in tokens, 32 or more.")
    if chosen[-1] > tokens:
        raise ValueError(
            f"The text has {tokens:,} tokens, too few for a length of {chosen[-1]:,}: give a longer text or smaller "
            "--lengths."
        )
    if table is not None and chosen[-1] > table:
        raise ValueError(
            f"The model has learned {table:,} positions and has none for a length of {chosen[-1]:,}: give smaller "
            "--lengths."
        )
    return chosen
