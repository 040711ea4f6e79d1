"""Parallel context windows (Ratner et al., 2023, arXiv:2212.10947): a prompt longer than those a model was trained on,
read as several texts side by side.

    windows = [tokenizer(text).input_ids for text in texts]
    task = tokenizer(question, return_tensors="pt").input_ids
    told = hf_arch.parallel_windows(model, windows, task)
    model.generate(task, **told)  # or model(task, **told)

Each window sees itself alone, and its positions begin at 0. The task, and what is generated, stand behind the longest
window, and see all of them. So no position is larger than a window and the task together, and reading costs as much as
the windows do, each by itself.
"""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hf_arch.attention import PATTERNS


@torch.no_grad()
def parallel_windows(
    model: PreTrainedModel, windows: Sequence[Sequence[int] | torch.Tensor], task: torch.Tensor, shared: int = 0
) -> dict:
    """Read `windows` with `model`, side by side, and answer what it is to be told with `task`:

        {"past_key_values", "attention_mask" [rows, keys and length], "position_ids" [rows, length]}

    model: any causal decoder, of transformers or of hf_arch, whose layers all have full attention, without a bias by
    distance. windows: the token ids of each, of any lengths. task [rows, length]: the token ids that follow, of one or
    several rows, without padding. shared: how many first tokens all windows have in common (1 for a token that begins a
    text): of their copies, which are equal, one is kept. Raises ValueError for a model that cannot, and for windows
    that are empty or do not begin alike.
    """
    check_model(model)
    texts = [torch.as_tensor(window, dtype=torch.long).cpu() for window in windows]
    check_texts(texts, task, shared)
    lengths = [len(text) for text in texts]
    # what pads the shorter windows comes after them, where a decoder does not look
    batch = pad_sequence(texts, batch_first=True).to(model.device)
    cache = model.get_decoder()(input_ids=batch, use_cache=True).past_key_values
    join(cache, lengths, shared)
    if len(task) > 1:
        cache.batch_repeat_interleave(len(task))
    told = {"dtype": torch.long, "device": model.device}
    place = max(lengths) + torch.arange(task.shape[1], **told)
    return {
        "past_key_values": cache,
        "attention_mask": torch.ones(len(task), cache.get_seq_length() + task.shape[1], **told),
        "position_ids": place.expand(len(task), -1),
    }


def join(cache: Cache, lengths: list[int], shared: int) -> None:
    """Make of a row for each window one row of all of them, without the copies of the `shared` tokens."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            rows = getattr(layer, name)
            parts = [rows[n, :, shared if n else 0 : length] for n, length in enumerate(lengths)]
            setattr(layer, name, torch.cat(parts, dim=1)[None])


def check_model(model: PreTrainedModel) -> None:
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config.is_encoder_decoder or kinds != {"full_attention"} or config._attn_implementation in PATTERNS:
        raise ValueError(
            f"Windows are read in parallel by decoders all of whose layers have full attention; this "
            f"{type(model).__name__} has {', '.join(sorted(kinds))} by {config._attn_implementation!r}."
        )
    if any(getattr(module, "biased", False) for module in model.modules()):
        raise ValueError("A bias by distance counts columns, and windows lie side by side: take rotary positions.")
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
        raise ValueError(f"A window of {config.sliding_window} tokens would hide the windows before it.")


def check_texts(texts: list[torch.Tensor], task: torch.Tensor, shared: int) -> None:
    if not texts or any(text.ndim != 1 or not len(text) for text in texts):
        raise ValueError("Give at least one window, each a list of token ids, none of them empty.")
    if task.ndim != 2 or not task.numel():
        raise ValueError(f"Give the task as token ids [rows, length], not {list(task.shape)}.")
    alike = all(len(text) > shared and torch.equal(text[:shared], texts[0][:shared]) for text in texts)
    if shared < 0 or not alike:
        raise ValueError(f"The windows do not have their first {shared} tokens in common, and more: give shared=0.")
