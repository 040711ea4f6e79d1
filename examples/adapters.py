"""One base, four adapters: `python examples/adapters.py`; needs the extra `examples`.

A small decoder reads texts of four tasks, and is frozen. Each task then learns an adapter (LoRA) and a head of its own
on it: key information in medical records, legal prose, financial sentiment, questions about a document. The four models
hold one set of base weights in memory; each is saved, perhaps pushed (`--push user/repo`), loaded by its name through
`pipeline(...)`, and compared with one adapter that learned all tasks together. `--model` takes another base, and
`--records`, `--text`, `--news` and `--questions` take files of your own (see `adapter_tasks.py`).
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline
from transformers.trainer_callback import PrinterCallback

import hf_arch
from adapter_tasks import LENGTH, Task, tasks
from hf_arch.architecture import AUTO_CLASSES
from hf_arch.demo.text import Document, python_manual, without_repeats
from hf_arch.demo.tokens import Stream, Windows, train_tokenizer

SIZES = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 3}
VOCABULARY = 2000
RANK = 8
STEPS = {"base": 600, "extraction": 500, "legal": 200, "sentiment": 800, "questions": 300}
BATCH = 8  # texts
ALL = "all"  # the adapter that learns all tasks


def learn(what: str, model, items, collator, steps: int, rate: float, batch_size: int = BATCH) -> None:
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            learning_rate=rate,
            per_device_train_batch_size=batch_size,
            warmup_steps=steps // 10,
            lr_scheduler_type="cosine",
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to=[],
        )
        trainer = Trainer(model, arguments, train_dataset=items, data_collator=collator)
        trainer.remove_callback(PrinterCallback)
        done = trainer.train().metrics
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"{what}: {trained:,} parameters learned for {steps} steps, {done['train_runtime']:.0f} s")


def pretrain(every: dict[str, Task], folder: Path, architecture: str) -> None:
    """A decoder that has read what the tasks learn from, and Python's manual; into `folder`, with its tokenizer."""
    texts = [task.read(example) for task in every.values() for example in task.train]
    documents = [*without_repeats(python_manual()), *(Document("", text) for text in dict.fromkeys(texts))]
    tokenizer = train_tokenizer(documents, VOCABULARY)
    row = hf_arch.find(architecture)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    model = row.load("ForCausalLM")(
        row.load("Config")(vocab_size=len(tokenizer), max_position_embeddings=512, **SIZES, **ends)
    )
    windows = Windows(Stream.of(documents, tokenizer), LENGTH)
    learn("base", model, windows, transformers.default_data_collator, STEPS["base"], 4e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def with_adapters(source: str, every: dict[str, Task]) -> dict[str, PeftModel]:
    """Of each task a head on the base, which all share, with an adapter of the task's name, and one for all tasks."""
    models = {}
    for name, task in every.items():
        torch.manual_seed(0)
        model = getattr(transformers, AUTO_CLASSES[task.head]).from_pretrained(source, **task.fields)
        configs = {
            adapter: hf_arch.lora_config(model, r=rank, lora_alpha=2 * rank)
            for adapter, rank in ((name, RANK), (ALL, len(every) * RANK))  # as many numbers in all
        }
        models[name] = get_peft_model(model, configs[name], adapter_name=name)
        models[name].add_adapter(ALL, configs[ALL])
    hf_arch.share_weights(models.values())
    return models


def teach(models: dict[str, PeftModel], every: dict[str, Task], tokenizer) -> None:
    """Each task its adapter, then the adapter for all."""
    features = {name: task.features(tokenizer, task.train) for name, task in every.items()}
    collators = {name: task.collator(tokenizer) for name, task in every.items()}
    for name, model in models.items():
        model.set_adapter(name)
        learn(name, model, features[name], collators[name], STEPS[name], 6e-3)
    together = hf_arch.MultiTaskModel(models, adapter=ALL)
    fewest = min(map(len, features.values()))
    batches = hf_arch.TaskBatches(features, collators, BATCH, limit=fewest)
    learn("all four", together, batches, batches.collate, sum(STEPS[name] for name in models), 3e-3, batch_size=1)


@torch.no_grad()
def check_base(model: PeftModel, base) -> None:
    """Without its adapter a model says to the last bit what the base did."""
    probe = torch.arange(LENGTH)[None]
    with model.eval().disable_adapter():
        if not torch.equal(model(probe).logits, base(probe).logits):
            raise RuntimeError("Learning has changed the base.")
    print("The base is as it was.")


def pipe(task: Task, model, tokenizer):
    """`model`: itself, or the name of a folder or of a repository on the Hub that holds an adapter."""
    options = {"aggregation_strategy": "simple"} if task.pipeline == "token-classification" else {}
    if isinstance(model, str):
        options["model_kwargs"] = task.fields
    return pipeline(task.pipeline, model=model, tokenizer=tokenizer, **options)


def push(folder: Path, names: list[str], repository: str) -> list[str]:
    """The adapters, each as a repository of its own; their names."""
    for name in names:
        HfApi().create_repo(f"{repository}-{name}", exist_ok=True)
        HfApi().upload_folder(repo_id=f"{repository}-{name}", folder_path=folder / name)
    return [f"{repository}-{name}" for name in names]


def megabytes(models) -> tuple[float, float]:
    """Of the parameters in memory, and if each model had its own."""
    every = [parameter for model in models for parameter in model.parameters()]
    distinct = {parameter.data_ptr(): parameter.nbytes for parameter in every}
    return sum(distinct.values()) / 1e6, sum(parameter.nbytes for parameter in every) / 1e6


def show(every: dict[str, Task], columns: dict[str, dict]) -> None:
    """columns: what is compared -> task -> measure -> number."""
    print("".join(f"{word:>14}" for word in ("task", "measure", *columns)))
    for name in every:
        for measure in columns["adapter"][name]:
            numbers = (column[name][measure] for column in columns.values())
            print(f"{name:>14}{measure:>14}" + "".join(f"{number:14.3f}" for number in numbers))


def run(given: argparse.Namespace, every: dict[str, Task], folder: Path) -> dict[str, dict]:
    """All of it; what the table shows."""
    source = given.model or str(folder / "base")
    if not given.model:
        pretrain(every, folder / "base", given.architecture)
    tokenizer = AutoTokenizer.from_pretrained(source)
    base = AutoModelForCausalLM.from_pretrained(source)
    if given.push:
        source = given.push
        hf_arch.push_to_hub(base, source, tokenizer)
    models = with_adapters(source, every)
    teach(models, every, tokenizer)
    check_base(models["legal"], base)
    for name, model in models.items():
        model.eval().save_pretrained(folder, selected_adapters=[name])
    places = push(folder, [*models], given.push) if given.push else [str(folder / name) for name in models]
    loaded = {name: pipe(task, place, tokenizer) for (name, task), place in zip(every.items(), places, strict=True)}
    hf_arch.share_weights([*models.values(), *(each.model for each in loaded.values())])

    columns = {kind: {} for kind in ("guess", "words", "adapter", "multi-task")}
    for name, task in every.items():
        columns["guess"][name], columns["words"][name] = task.baselines(tokenizer, task.train, task.held_out).values()
        columns["adapter"][name] = task.score(loaded[name], task.held_out)
        models[name].set_adapter(ALL)
        columns["multi-task"][name] = task.score(pipe(task, models[name], tokenizer), task.held_out)
        print(f"{name}: {task.texts}; {len(task.train)} to learn from, {len(task.held_out)} held out")
        print("  for instance:", loaded[name](task.request(task.held_out[0])))
    show(every, columns)
    own, apart = megabytes(each.model for each in loaded.values())
    print(f"The four models take {own:.1f} MB; {apart:.1f} if each had a base of its own.")
    return columns


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architecture", default="transformer", help="of the base: a row of `hf-arch list`")
    parser.add_argument("--model", help="a causal model of hf_arch to take as the base, with its tokenizer")
    parser.add_argument("--push", metavar="USER/REPO", help="push the base here, and adapters to USER/REPO-TASK")
    parser.add_argument("--output", type=Path, help="a folder that keeps all")
    for name, what in (("records", "extraction"), ("news", "sentiment"), ("questions", "questions")):
        parser.add_argument(f"--{name}", metavar="FILE", help=f"lines of JSON, for {what}")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="legal text")
    given = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    every = tasks(given.records, given.text, given.news, given.questions)
    with TemporaryDirectory() as temporary:
        return run(given, every, given.output or Path(temporary))


if __name__ == "__main__":
    main()
