"""The example, on a tiny Llama with random weights."""

import torch

from examples.llama_past_its_window import load, write


@torch.no_grad()
def test_the_cache_stays_as_it_is_and_the_text_as_one_pass_says():
    model = load(None).eval()
    prompt = torch.randint(256, (1, 64), generator=torch.Generator().manual_seed(1))
    short, held = write(model, prompt, 40, window=32)
    text, later = write(model, prompt, 400, window=32)
    assert held == later == 2 * 2 * 64 * (4 + 31) * 4
    assert text.shape == (1, 464) and torch.equal(text[:, :104], short)
    assert torch.equal(model(text, use_cache=False).logits[:, 63:-1].argmax(-1), text[:, 64:])
