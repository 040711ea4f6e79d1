"""A Llama of transformers reads and writes a text many times as long as it was trained on: `python
examples/llama_past_its_window.py [MODEL]`.

MODEL is a folder or a name on the Hub of any decoder with Llama's rotary positions; without one, a tiny Llama with
random weights stands in, and nothing is downloaded. Each token sees a window and the first few tokens (StreamingLLM,
arXiv:2309.17453), so that the memory of generation stays as it is, however long the text.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_arch

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def load(source: str | None) -> PreTrainedModel:
    if source is not None:
        return AutoModelForCausalLM.from_pretrained(source)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=128, **SIZES))


def write(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, window: int, sinks: int = 4):
    """The text that the model writes after `prompt` [1, length], and how many bytes its cache holds at the end."""
    hf_arch.register_attention("streaming", window=window, sinks=sinks)
    model.set_attn_implementation("streaming")
    cache = hf_arch.window_cache(model)
    text = model.generate(
        prompt, past_key_values=cache, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return text, hf_arch.state_bytes(cache)


if __name__ == "__main__":
    model = load(sys.argv[1] if sys.argv[1:] else None).eval()
    known = model.config.max_position_embeddings
    prompt = torch.randint(model.config.vocab_size, (1, known // 2))
    for times in (1, 4, 8):
        text, held = write(model, prompt, times * known, window=known // 2)
        print(
            f"{text.shape[1]:6d} tokens, {text.shape[1] / known:.1f} x the trained length: the cache holds {held} bytes"
        )
