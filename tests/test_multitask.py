"""Models of several tasks on one set of base weights, with adapters of their own, and trained together."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import hf_arch
from promises import HEADS

TASKS = {"says": "ForCausalLM", "names": "ForTokenClassification", "sorts": "ForSequenceClassification"}
SAMPLES = {
    "says": [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 5,
    "names": [{"input_ids": [9, 6, 7], "labels": [0, 1, 1]}] * 4,
    "sorts": [{"input_ids": [9, 6, 3], "labels": 1}] * 30,
}


def heads(row: str, **fields) -> dict[str, torch.nn.Module]:
    cases = {case.head: case for case in HEADS if case.row.name == row}
    return {task: cases[head].build(dtype=torch.float32, **fields) for task, head in TASKS.items()}


@pytest.fixture(params=["transformer", "mixtral"])
def models(request):
    return heads(request.param)


def adapted(models, *names: str) -> dict[str, PeftModel]:
    """With an adapter of the name of its task, and those of further names."""
    found = {}
    for task, model in models.items():
        config = hf_arch.lora_config(model, r=2, init_lora_weights=False)
        torch.manual_seed(len(found))
        found[task] = get_peft_model(model, config, adapter_name=task)
        for name in names:
            found[task].add_adapter(name, hf_arch.lora_config(model, r=2, init_lora_weights=False))
    return found


@torch.no_grad()
def said(models, tokens) -> dict[str, torch.Tensor]:
    return {task: model.eval()(tokens).logits for task, model in models.items()}


def distinct(models) -> int:
    return sum({p.data_ptr(): p.numel() for model in models.values() for p in model.parameters()}.values())


@torch.no_grad()
def test_models_hold_one_base_and_their_own_heads(models, tokens):
    first = models["says"].model
    size = sum(p.numel() for p in first.parameters())
    separate = distinct(models)
    for p in models["names"].model.parameters():
        p.add_(0.1)
    hf_arch.share_weights(models.values())
    assert separate - distinct(models) == 2 * size
    before = said(models, tokens)
    hidden = first(tokens).last_hidden_state
    torch.testing.assert_close(before["names"], models["names"].score(hidden))
    first.embed_tokens.weight.mul_(2)
    after = said(models, tokens)
    assert all(not torch.equal(after[task], before[task]) for task in models)


def test_tied_embeddings_stay_tied():
    models = heads("transformer", tie_word_embeddings=True)
    hf_arch.share_weights([models["names"], models["says"]])
    assert models["says"].lm_head.weight is models["names"].model.embed_tokens.weight


def test_adapters_share_the_base_and_are_saved_apart(models, tokens, tmp_path):
    bare = said(models, tokens)
    changed = adapted(models)
    before = said(changed, tokens)
    hf_arch.share_weights(changed.values())
    torch.testing.assert_close(said(changed, tokens), before)  # each with its own, whatever was used last
    for task, model in changed.items():
        with model.disable_adapter():
            torch.testing.assert_close(model(tokens).logits, bare[task])
        model.save_pretrained(tmp_path)
        assert not any(
            other in key for key in load_file(tmp_path / task / "adapter_model.safetensors") for other in TASKS
        )
    row = "mixtral" if "Mixtral" in type(models["says"]).__name__ else "transformer"
    fresh = heads(row)
    loaded = {task: PeftModel.from_pretrained(model, tmp_path / task) for task, model in fresh.items()}
    hf_arch.share_weights([*changed.values(), *loaded.values(), heads(row)["sorts"]])
    torch.testing.assert_close(said(loaded, tokens), before)


def test_bases_that_differ_are_refused():
    one, other = heads("transformer")["says"], heads("transformer", hidden_size=16)["names"]
    with pytest.raises(ValueError, match="bases of ArchTransformerForCausalLM and"):
        hf_arch.share_weights([one, other])
    with pytest.raises(ValueError, match="adapters 'all'"):
        hf_arch.share_weights(adapted(heads("transformer")).values(), "all")
    with pytest.raises(ValueError, match="no task 'sings'; there are says"):
        hf_arch.MultiTaskModel(heads("transformer"))("sings")


def batches(**options) -> hf_arch.TaskBatches:
    def collate(items):
        return {name: torch.tensor([item[name] for item in items]) for name in items[0]}

    return hf_arch.TaskBatches(SAMPLES, dict.fromkeys(SAMPLES, collate), batch_size=4, **options)


def test_batches_are_of_one_task_and_hold_all_up_to_a_limit():
    every = batches()
    assert [every[i]["task"] for i in range(len(every))] == ["says"] * 2 + ["names"] + ["sorts"] * 8
    assert sum(len(every[i]["input_ids"]) for i in range(len(every))) == 39
    assert len(batches(limit=5)) == 5
    with pytest.raises(ValueError, match="per_device_train_batch_size=1"):
        every.collate([every[0], every[1]])
    with pytest.raises(ValueError, match="nothing to learn for sings"):
        hf_arch.TaskBatches({"sings": []}, {}, 4)


def arguments(folder, **options) -> TrainingArguments:
    told = {"per_device_train_batch_size": 1, "remove_unused_columns": False, "max_steps": 6, "use_cpu": True}
    told |= {"learning_rate": 1e-2, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    return TrainingArguments(str(folder), **told | options)


def train(model, folder, resume=None, **options):
    items = batches(limit=8)
    trainer = Trainer(model, arguments(folder, **options), train_dataset=items, data_collator=items.collate)
    trainer.train(resume_from_checkpoint=resume)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_all_tasks_are_learned_together_and_a_run_resumes(tmp_path):
    start = {name: p.clone() for name, p in hf_arch.MultiTaskModel(heads("transformer")).named_parameters()}
    model = hf_arch.MultiTaskModel(heads("transformer"))
    whole = train(model, tmp_path, save_strategy="steps", save_steps=3)
    assert all(not torch.equal(whole[name], start[name]) for name in start)
    bases = [task.model.embed_tokens.weight for task in model.tasks.values()]
    assert bases[0] is bases[1] is bases[2]
    again = train(hf_arch.MultiTaskModel(heads("transformer")), tmp_path, resume=str(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(again, whole)


def test_one_adapter_learns_all_tasks_and_is_switched(tokens, tmp_path):
    models = adapted(heads("transformer"), "all")
    own = said(models, tokens)
    together = hf_arch.MultiTaskModel(models, adapter="all")
    shared = [task.base_model.model.model.layers[0].mixer.q_proj for task in models.values()]
    assert shared[0].lora_A["all"].weight is shared[1].lora_A["all"].weight
    assert shared[0].lora_A["says"].weight is not shared[1].lora_A["names"].weight
    before = {name: p.clone() for name, p in together.named_parameters()}
    after = train(together, tmp_path)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if ".all." in name}
    for task, model in models.items():
        model.set_adapter(task)
    torch.testing.assert_close(said(models, tokens), own)
