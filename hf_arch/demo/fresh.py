"""A script for a process that cannot import hf_arch: base and adapter load from their folders, write text, and answer.

`run.py` runs it, with the questions as JSON on the standard input.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed


@torch.no_grad()
def answer(model, tokenizer, question: dict, new_tokens: int) -> tuple[str, torch.Tensor]:
    set_seed(0)
    prompt = tokenizer(question["prompt"], return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=new_tokens, do_sample=True, temperature=0.7, top_p=0.9)
    logits = model(input_ids=torch.tensor([question["tokens"]])).logits
    return tokenizer.decode(written[0], skip_special_tokens=True), logits.contiguous()


def main():
    task = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(task["base"]["folder"])
    model = AutoModelForCausalLM.from_pretrained(task["base"]["folder"], trust_remote_code=True)
    base_text, base_logits = answer(model, tokenizer, task["base"], task["new_tokens"])
    model = PeftModel.from_pretrained(model, task["adapter"]["folder"])
    adapter_text, adapter_logits = answer(model, tokenizer, task["adapter"], task["new_tokens"])
    answers = Path(task["answers"])
    save_file({"base": base_logits, "adapter": adapter_logits}, answers / "logits.safetensors")
    (answers / "written.json").write_text(json.dumps({"base": base_text, "adapter": adapter_text}))


if __name__ == "__main__":
    sys.modules["hf_arch"] = None  # any import of it fails
    main()
