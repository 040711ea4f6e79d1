"""Parallel context windows: equal to their definition, a mask and positions over one long text, in any decoder."""

import pytest
import torch
import transformers
from originals import LLAMA, scaled_up
from torch.testing import assert_close

import hf_arch
from promises import Case, some_tokens

LENGTHS, SHARED = (9, 14, 1, 5), 1
SIZES = LLAMA | {"vocab_size": 96, "max_position_embeddings": 64}
OURS = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}


def native(kind: str):
    model_class = getattr(transformers, kind)
    fields = SIZES | ({"head_dim": 16} if "Qwen" in kind else {})
    return scaled_up(model_class(model_class.config_class(**fields))).double()


def ours(name: str, **fields):
    return Case(hf_arch.find(name), "ForCausalLM").build(**OURS, **fields)


MODELS = {
    "llama": lambda: native("LlamaForCausalLM"),
    "qwen3": lambda: native("Qwen3ForCausalLM"),
    "gpt2": lambda: scaled_up(
        transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4))
    ).double(),
    "sparse_transformer": lambda: ours("sparse_transformer"),
    "transformer": lambda: ours("transformer"),
    "mixtral": lambda: ours("mixtral"),
}


def some_windows(begin: bool = False) -> list[torch.Tensor]:
    windows = [some_tokens(1, length, seed=length)[0] for length in LENGTHS]
    return [torch.cat((torch.tensor([1]), window)) for window in windows] if begin else windows


def defined(model, windows: list[torch.Tensor], task: torch.Tensor, shared: int = 0) -> torch.Tensor:
    """Logits of the task by one forward pass over everything: a token sees its window, the task all."""
    windows = [window[shared if number else 0 :] for number, window in enumerate(windows)]
    sizes = [len(window) for window in windows]
    number = torch.cat([torch.full((size,), n) for n, size in enumerate(sizes)] + [torch.full_like(task[0], -1)])
    places = [torch.arange(size) + (shared if n else 0) for n, size in enumerate(sizes)]
    last = max(int(place[-1]) for place in places) + 1
    place = torch.cat([*places, last + torch.arange(task.shape[1])])
    total = len(number)
    seen = (number[:, None] == number) | (number[:, None] == -1)
    seen[:, :shared] = True  # the tokens that all windows begin with
    seen = seen & torch.ones(total, total).tril().bool()
    mask = torch.zeros(1, 1, total, total, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
    text = torch.cat((*windows, task[0]))[None]
    told = {"attention_mask": mask, "position_ids": place[None], "use_cache": False}
    return model(text, **told).logits[:, -task.shape[1] :]


@torch.no_grad()
@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_side_by_side_equals_the_mask(name, begin):
    model, task, windows = MODELS[name](), some_tokens(1, 12), some_windows(begin)
    shared = SHARED if begin else 0
    expected = defined(model, windows, task, shared)
    told = hf_arch.parallel_windows(model, windows, task, shared)
    held = sum(LENGTHS) + (SHARED if begin else 0)
    assert told["past_key_values"].get_seq_length() == held and told["attention_mask"].shape[1] == held + 12
    assert_close(model(task, **told).logits, expected, atol=1e-8, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "transformer"])
def test_generation_goes_on_behind_the_longest_window(name):
    model, task, windows = MODELS[name](), some_tokens(1, 6), some_windows()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    text, length = task, task.shape[1]
    for _ in range(8):
        text = torch.cat((text, defined(model, windows, text)[:, -1:].argmax(-1)), dim=1)
    told = hf_arch.parallel_windows(model, windows, task)
    assert torch.equal(model.generate(task, **told, **options), text)
    several = torch.cat((task, some_tokens(1, length, seed=5)))
    told = hf_arch.parallel_windows(model, windows, several)
    answers = model.generate(several, **told, **options)
    assert torch.equal(answers[:1], text)


@torch.no_grad()
def test_one_window_is_a_prompt_and_the_order_of_windows_does_not_matter():
    model, task, windows = MODELS["llama"](), some_tokens(1, 6), some_windows()
    alone = model(task, **hf_arch.parallel_windows(model, windows[:1], task)).logits
    whole = torch.cat((windows[0], task[0]))[None]
    assert_close(alone, model(whole).logits[:, -6:], atol=1e-8, rtol=1e-6)
    found = [model(task, **hf_arch.parallel_windows(model, way, task)).logits for way in (windows, windows[::-1])]
    assert_close(*found, atol=1e-8, rtol=1e-6)
    assert (found[0] - alone).abs().max() > 0.1


@torch.no_grad()
def test_a_prompt_longer_than_the_positions_is_read():
    model, task = MODELS["transformer"](), some_tokens(1, 12)
    learned = ours("sparse_transformer", max_position_embeddings=64)
    windows = [some_tokens(1, 50, seed=n)[0] for n in range(6)]
    with pytest.raises(ValueError, match="past the 64 learned positions"):
        learned(torch.cat((*windows, task[0]))[None])
    for each in (model, learned):
        assert each(task, **hf_arch.parallel_windows(each, windows, task)).logits.isfinite().all()


def test_what_cannot_be():
    model, task = MODELS["llama"](), some_tokens(1, 4)
    for windows, told, said in (
        ([], {}, "at least one window"),
        ([[3], []], {}, "none of them empty"),
        ([[3, 4], [4, 5]], {"shared": 1}, "first 1 tokens in common"),
        ([[3], [3, 4]], {"shared": 1}, "first 1 tokens in common, and more"),
    ):
        with pytest.raises(ValueError, match=said):
            hf_arch.parallel_windows(model, windows, task, **told)
    with pytest.raises(ValueError, match=r"\[rows, length\]"):
        hf_arch.parallel_windows(model, [[3]], task[0])
    hf_arch.register_attention("narrow", window=8)
    model.set_attn_implementation("narrow")
    with pytest.raises(ValueError, match="full attention"):
        hf_arch.parallel_windows(model, [[3]], task)
    for name, fields in (("retnet", {}), ("sparse_transformer", {}), ("transformer", {"position_type": "alibi"})):
        other = Case(hf_arch.find(name), "ForCausalLM").build(**fields)
        with pytest.raises(ValueError, match="full attention|bias by distance"):
            hf_arch.parallel_windows(other, [[3]], task)
    slid = transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=8))
    with pytest.raises(ValueError, match="would hide|full attention"):
        hf_arch.parallel_windows(slid, [[3]], task)
