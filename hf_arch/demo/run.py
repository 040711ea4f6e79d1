"""The demo: from text to a language model, a LoRA adapter on it, and both merged, each saved, loaded and checked."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_arch import ARCHITECTURES, Architecture, find, lora_config
from hf_arch.demo import fresh, report
from hf_arch.demo.job import Job, Scale, Stage
from hf_arch.demo.ngrams import NGram
from hf_arch.demo.screen import Screen
from hf_arch.demo.text import python_manual, python_source, read_files, split
from hf_arch.demo.tokens import TokenizedCorpus, train_tokenizer
from hf_arch.demo.training import Point
from hf_arch.export import export, push_to_hub
from hf_arch.publish import refuse_another_model, staged


def run(
    architecture: str = "retnet",
    text: Iterable[str | Path] = (),
    output: str | Path = "hf_arch_demo",
    push: str | None = None,
    scale: Scale | None = None,
) -> Job:
    """Do the main job with `architecture`, on the user's `text` files if there are any.

    Raises ValueError or OSError, before anything is trained, for what cannot work: an architecture or a text that is
    not fit, an `output` that holds something else, a `push` without a login.
    """
    row, scale = with_causal_head(find(architecture)), scale or Scale()
    if push is not None:
        check_login(push)
    prose = split("your text", read_files(text)) if text else split("the manual", python_manual())
    source = split("Python source", python_source())
    folder = Path(output).resolve() / row.name
    folder.mkdir(parents=True, exist_ok=True)

    with Screen() as screen:
        screen.say(f"{prose}\n{source}")
        tokenizer = train_tokenizer(prose.train, scale.vocab_size)
        prose, source = (TokenizedCorpus.of(corpus, tokenizer, scale.length) for corpus in (prose, source))
        job = Job(row, scale, folder, screen, tokenizer, (prose, source))
        count_n_grams(job)
        base_curve = train_base(job)
        adapter_curve = fine_tune(job)
        samples = load_without_hf_arch(job)
        merge(job)
        address = push_to_hub(folder / "merged", push) if push is not None else None
    report.picture(job, base_curve, adapter_curve, folder / "curves.png")
    report.show(job, samples, address)
    return job


def with_causal_head(row: Architecture) -> Architecture:
    if "ForCausalLM" not in row.heads:
        able = ", ".join(row.name for row in ARCHITECTURES if "ForCausalLM" in row.heads)
        raise ValueError(f"{row.name} writes no text: it has no head for causal language models. Take one of {able}.")
    return row


def check_login(repo_id: str) -> None:
    """Ask the Hub now what it would refuse after the training."""
    validate_repo_id(repo_id)
    if get_token() is None:
        raise PermissionError("--push asks for a login: run `hf auth login`, or set HF_TOKEN.")
    user = HfApi().whoami()
    mine = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    owner, _, name = repo_id.rpartition("/")
    if owner not in mine:
        raise PermissionError(f"--push {repo_id}: this login owns {', '.join(mine)}. Try --push {mine[0]}/{name}.")


def count_n_grams(job: Job) -> None:
    """The baselines: what counts of pairs, and of triples, of the same tokens predict."""
    for name, order in (("bigram", 2), ("trigram", 3)):
        started = time.perf_counter()
        models = [NGram(text.train.tokens, order, job.scale.vocab_size) for text in job.texts]
        losses = [model.loss(text.held_out.tokens) for model, text in zip(models, job.texts, strict=True)]
        figures = [text.held_out.figures(loss) for loss, text in zip(losses, job.texts, strict=True)]
        job.stages.append(Stage(name, figures, seconds=time.perf_counter() - started))


def train_base(job: Job) -> list[Point]:
    """A small model learns the first text from nothing; saved with its tokenizer, its code and a model card."""
    started, text, folder = time.perf_counter(), job.texts[0], job.folder / "base"
    model = job.new_model()
    refuse_older_models(model, folder)
    job.stages.append(Stage("untrained", job.measure(model)))
    curve = job.learn(model, text, job.scale.base, "Training the base")
    remove(job.folder / "adapter")  # of an earlier run: it fits the earlier base alone
    export(model, folder, job.tokenizer)
    job.finish("base", model, text, folder / "model.safetensors", started)
    return curve


def refuse_older_models(model: PreTrainedModel, folder: Path) -> None:
    """Where `folder` holds a model of other sizes, say so now and not after the training."""
    if not folder.exists():
        return
    with TemporaryDirectory() as untrained:
        model.save_pretrained(untrained)
        refuse_another_model(Path(untrained), folder)


def remove(folder: Path) -> None:
    """At once: whoever is killed half-way leaves no half of it under its name."""
    if folder.exists():
        with TemporaryDirectory(dir=folder.parent, prefix=".old") as bin:
            folder.rename(Path(bin, folder.name))


def fine_tune(job: Job) -> list[Point]:
    """The saved base, loaded like any other model, learns the second text with low-rank adapters."""
    started, text, folder = time.perf_counter(), job.texts[1], job.folder / "adapter"
    base = AutoModelForCausalLM.from_pretrained(job.folder / "base")
    model = get_peft_model(base, lora_config(base, r=job.scale.rank, lora_alpha=2 * job.scale.rank))
    curve = job.learn(model, text, job.scale.adapter, "Training the adapter")
    with staged(folder) as stage:
        model.save_pretrained(stage)
    job.finish("adapter", model, text, folder / "adapter_model.safetensors", started)
    return curve


def load_without_hf_arch(job: Job) -> dict[str, str]:
    """In a new process, where hf_arch cannot be imported, base and adapter write text and compute the same logits."""
    questions = {
        name: {"folder": str(job.folder / name), "tokens": job.probe(text), "prompt": text.prompt}
        for name, text in zip(("base", "adapter"), job.texts, strict=True)
    }
    with job.screen.waiting("Loading without hf_arch"), TemporaryDirectory() as home:
        alone = subprocess.run(
            [sys.executable, "-P", fresh.__file__],
            input=json.dumps({"answers": home, "new_tokens": job.scale.new_tokens, **questions}),
            env=os.environ | {"HF_HOME": home, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        if alone.returncode:
            raise RuntimeError(f"The saved models do not load without hf_arch:\n{alone.stderr}")
        answers = load_file(f"{home}/logits.safetensors")
        for name in questions:
            job.check(f"{name}, loaded without hf_arch", answers[name], job.logits[name])
        return json.loads(Path(home, "written.json").read_text())


def merge(job: Job) -> None:
    """Base and adapter become one model, which loads with `import hf_arch` and no remote code."""
    started, text, folder = time.perf_counter(), job.texts[1], job.folder / "merged"
    base = AutoModelForCausalLM.from_pretrained(job.folder / "base")
    export(PeftModel.from_pretrained(base, job.folder / "adapter").merge_and_unload(), folder, job.tokenizer)
    merged = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    job.finish("merged", merged, text, folder / "model.safetensors", started)
    job.check("merged, loaded with hf_arch", job.logits["merged"], job.logits["adapter"])
