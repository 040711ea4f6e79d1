"""Models asked in a process that cannot import hf_arch. The tests ask the same here, and compare."""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import peft
import torch
import transformers


def ask_alone(jobs: dict[str, dict], folder: Path, **environment: str) -> dict[str, dict[str, torch.Tensor] | str]:
    """The answers to jobs of {"auto": an Auto class, "source": a folder or repository, and options of from_pretrained},
    or the traceback of a job that fails. A job with "resave" saves there, and loads again from there. The process works
    and caches in `folder`."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"} | environment
    subprocess.run([sys.executable, __file__], cwd=folder, env=environment, check=True)
    return torch.load(folder / "answers.pt")


@torch.no_grad()
def answer(model) -> dict[str, torch.Tensor]:
    """What a model says to fixed tokens, and how it goes on."""
    inputs = {"input_ids": torch.arange(1, 49).view(2, 24)}
    if type(model).__name__.endswith("ForMultipleChoice"):
        inputs = {"input_ids": inputs["input_ids"][None]}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :7]
    said = {name: value for name, value in model.eval()(**inputs).items() if isinstance(value, torch.Tensor)}
    if model.can_generate():
        said["continued"] = model.generate(inputs["input_ids"], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return said


def load(auto: str, source: str, resave: str | None = None, **options):
    library = peft if auto.startswith("AutoPeft") else transformers
    model = getattr(library, auto).from_pretrained(source, trust_remote_code=True, **options)
    if resave is None:
        return model
    model.save_pretrained(resave)
    return load(auto, resave)


def attempt(call, *args, **options):
    try:
        return call(*args, **options)
    except Exception:
        return traceback.format_exc()


def main():
    jobs = json.loads(Path("jobs.json").read_text())
    models = {name: attempt(load, **job) for name, job in jobs.items()}  # all are there when the first is asked
    answers = {name: model if isinstance(model, str) else attempt(answer, model) for name, model in models.items()}
    torch.save(answers, "answers.pt")


if __name__ == "__main__":
    sys.modules["hf_arch"] = None  # any import of the package fails
    main()
