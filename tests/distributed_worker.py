"""What each of the two processes of test_distributed.py does: `distributed_worker.py FOLDER [CASE...]`.

Every check of every case is reported in FOLDER/report.json: an empty text where it passed in both processes, else what
went wrong. An equal answer proves nothing where nothing was split, so each check first looks at what a process holds.
"""

import contextlib
import gc
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from examples import pretrain
from hf_arch.modeling.layers.experts import SideBySide
from hf_arch.modeling.skeleton import heads, loss
from hf_arch.modeling.skeleton.backbone import Backbone
from hf_arch.search.contrastive import COLUMNS, ContrastiveTrainer
from hf_arch.streams import Segments, StatefulTrainer
from promises import DECODERS, EXACT, MODELS, ROWS, Case, some_tokens
from training_buffer_toy import ToyConfig, ToyForCausalLM, buffers

VARIANTS = ("t5", "shared", "early_exit", "hierarchical", "further")
CASES = [*MODELS, *(case for case in DECODERS if case.variant in VARIANTS)]
CASES.append(Case(ROWS[0].row, "ForCausalLM", "tied", {"tie_word_embeddings": True, "attention_bias": True}))
ROUTED = {"feed_forward_types": ["gated", "expert_choice"], "num_local_experts": 4}
CASES.append(Case(ROWS[0].row, "ForMaskedLM", "expert_choice", ROUTED))
LONGFORMER = next(case.row for case in ROWS if case.row.name == "longformer")
CASES.append(
    Case(LONGFORMER, "ForMaskedLM", "no_global_token", {"num_global_tokens": 0})
)  # for which there are weights
# The dimension of the weight that each style splits; other styles hook a module and split nothing
SPLIT = {"colwise": -2, "colwise_gather_output": -2, "packed_colwise": -2, "embedding_rowwise": -2, "rowwise": -1}
SPLIT |= {"grouped_gemm": 0}
HOOKS = ("moe_tp_experts", "ep_dispatch_experts", "mla_kv_a_proj")


def share(batch: torch.Tensor) -> torch.Tensor:
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def inputs_of(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor | bool]:
    """What the model reads: a text, or a source and an answer."""
    answers = getattr(model, "module", model).config.is_encoder_decoder
    return {"input_ids": ids, "use_cache": False} | ({"decoder_input_ids": ids} if answers else {})


def learn(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Adds to the gradients; the logits come from another pass, since a loss in chunks makes none."""
    with torch.no_grad():
        logits = model(**inputs_of(model, ids)).logits
    model(**inputs_of(model, ids), labels=ids).loss.backward()
    return logits


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_gradients(model: nn.Module, reference: nn.Module, of_experts: float = 1.0) -> None:
    """`of_experts`: what those of experts are multiplied by."""
    expected = {name: weight.grad for name, weight in reference.named_parameters()}
    expected = {name: grad * of_experts if ".experts." in name else grad for name, grad in expected.items()}
    found = {name.removeprefix("module."): whole(weight.grad) for name, weight in model.named_parameters()}
    assert_close(found, expected, **EXACT)


def single(case: Case, ids: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    """What one process makes of the joint batch: the model with its gradients, the logits."""
    model = case.build().train()
    return model, learn(model, ids)


def data_parallel(case: Case, folder: Path) -> None:
    ids = some_tokens(batch=4)
    reference, _ = single(case, ids)
    model = DistributedDataParallel(case.build().train())
    for _ in range(2):  # an unused parameter is complained of in the second pass
        model.zero_grad()
        learn(model, share(ids))
    assert_gradients(model, reference)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Those of its stack, or of both."""
    return [layer for stack in model.modules() if isinstance(stack, Backbone) for layer in stack.layers]


def by_hand(model: nn.Module) -> nn.Module:
    """Each layer by itself, then the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def assert_sharded(model: nn.Module) -> None:
    assert isinstance(model, FSDPModule)
    assert {type(layer).__name__ for layer in layers_of(model)} == {"FSDPLayer"}
    for name, weight in model.named_parameters():
        assert isinstance(weight, DTensor), name
        rows = [len(part) for part in torch.arange(len(weight)).chunk(dist.get_world_size())] + [0]
        assert weight.to_local().shape == (rows[dist.get_rank()], *weight.shape[1:]), name


def fully_sharded(case: Case, folder: Path) -> None:
    ids = some_tokens(batch=4)
    reference, logits = single(case, ids)
    model = by_hand(case.build().train())
    assert_sharded(model)
    assert_close(learn(model, share(ids)), share(logits), **EXACT)
    assert_gradients(model, reference)

    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert_close(full, reference.state_dict(), **EXACT)
    dcp.save(get_model_state_dict(model), checkpoint_id=folder / "dcp")
    other = by_hand(case.build().train())
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    dcp.load(state := get_model_state_dict(other), checkpoint_id=folder / "dcp")
    other.load_state_dict(state)
    with torch.no_grad():
        assert_close(other(**inputs_of(other, share(ids))).logits, share(logits), **EXACT)


def loaded(case: Case, folder: Path, **sizes: int) -> nn.Module:
    """The case's model, saved by one process and loaded in parts."""
    if dist.get_rank() == 0:
        case.build().save_pretrained(folder)
    dist.barrier()
    kind = case.row.load(case.head)
    return kind.from_pretrained(folder, dtype=torch.float64, distributed_config=DistributedConfig(**sizes))


def fully_sharded_by_transformers(case: Case, folder: Path) -> None:
    ids = some_tokens(batch=4)
    reference, logits = single(case, ids)
    model = loaded(case, folder, fsdp_size=dist.get_world_size()).train()
    assert_sharded(model)
    assert_close(learn(model, share(ids)), share(logits), **EXACT)
    assert_gradients(model, reference)


def assert_split(model: nn.Module, plan: dict[str, str]) -> None:
    """Every rule of the plan names some weights, of which a process holds the half that the rule says."""
    for rule, style in ((rule, style) for rule, style in plan.items() if style not in HOOKS):
        named = re.compile(re.escape(rule).replace(r"\*", r"\d+") + r"(\.weight)?").fullmatch
        weights = {name: weight for name, weight in model.named_parameters(remove_duplicate=False) if named(name)}
        assert weights, f"{rule} names nothing"
        for name, weight in weights.items():
            half = list(weight.shape)
            half[SPLIT[style]] //= dist.get_world_size()
            assert isinstance(weight, DTensor) and list(weight.to_local().shape) == half, name


def tensor_parallel(case: Case, folder: Path) -> None:
    ids = some_tokens()
    reference, logits = single(case, ids)
    model = loaded(case, folder, tp_size=dist.get_world_size()).train()
    assert [rule for rule in model.tp_plan if ".feed_forward." in rule]
    assert_split(model, model.tp_plan)
    assert_close(learn(model, ids), logits, **EXACT)
    assert_gradients(model, reference)
    if model.can_generate():
        answer = model.eval().generate(ids, max_new_tokens=6, do_sample=False)
        assert_close(answer, reference.eval().generate(ids, max_new_tokens=6, do_sample=False))
    model.save_pretrained(folder / "again")
    dist.barrier()
    again = case.row.load(case.head).from_pretrained(folder / "again", dtype=torch.float64)
    assert_close(again.state_dict(), reference.state_dict(), atol=0, rtol=0)


def assert_experts_dealt_out(model: nn.Module) -> None:
    """Every process holds whole experts, its share of them."""
    assert_split(model, model.ep_plan)
    dealt_out = [module for module in model.modules() if isinstance(module, SideBySide)]
    assert dealt_out
    for experts in dealt_out:
        assert experts.num_experts == model.config.num_local_experts // dist.get_world_size()


def expert_parallel(case: Case, folder: Path) -> None:
    """Attention split, experts dealt out, one batch."""
    ids, size = some_tokens(), dist.get_world_size()
    reference, logits = single(case, ids)
    model = loaded(case, folder, tp_size=size, ep_size=size).train()
    assert_split(model, {rule: style for rule, style in model.tp_plan.items() if ".experts" not in rule})
    assert_experts_dealt_out(model)
    assert_close(learn(model, ids), logits, **EXACT)
    assert_gradients(model, reference)
    if model.can_generate():
        answer = model.eval().generate(ids, max_new_tokens=6, do_sample=False)
        assert_close(answer, reference.eval().generate(ids, max_new_tokens=6, do_sample=False))
    model.save_pretrained(folder / "again")
    dist.barrier()
    again = case.row.load(case.head).from_pretrained(folder / "again", dtype=torch.float64)
    assert_close(again.state_dict(), reference.state_dict(), atol=0, rtol=0)


def expert_and_data_parallel(case: Case, folder: Path) -> None:
    """Experts dealt out, each process with a batch of its own. transformers 5.23 divides the gradients of experts by
    the number of batches twice where an expert is in one process only."""
    ids, size = some_tokens(batch=4), dist.get_world_size()
    reference, logits = single(case, ids)
    model = loaded(case, folder, fsdp_size=size, ep_size=size).train()
    assert_experts_dealt_out(model)
    assert_close(learn(model, share(ids)), share(logits), **EXACT)
    assert_gradients(model, reference, of_experts=1 / size)


def toy() -> nn.Module:
    torch.manual_seed(0)
    return ToyForCausalLM(ToyConfig()).double().train()


def train_toy(model: nn.Module, mine: Callable, no_sync=contextlib.nullcontext) -> dict[str, torch.Tensor]:
    """Three steps on a joint batch in two pieces, `mine` of each; the training buffers after them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    for step in range(3):
        first, second = some_tokens(8, 12, seed=step).remainder(32).chunk(2)
        with no_sync():
            learn(model, mine(first))
        learn(model, mine(second))
        optimizer.step()
        optimizer.zero_grad()
    return buffers(getattr(model, "module", model))


def assert_equal_everywhere(values: dict[str, torch.Tensor]) -> None:
    both = [None] * dist.get_world_size()
    dist.all_gather_object(both, values)
    assert_close(both[0], both[1], atol=0, rtol=0)


def training_buffers() -> None:
    """The reference runs in both processes too, so that all it saw counts twice; only the number of tokens shows it."""
    expected = train_toy(toy(), lambda ids: ids)
    expected |= {name: value / 2 for name, value in expected.items() if name.endswith(".tokens")}
    parallel = DistributedDataParallel(toy())
    sharded = by_hand(toy())
    assert_sharded(sharded)
    for found in (train_toy(parallel, share, parallel.no_sync), train_toy(sharded, share)):
        assert found["model.layers.0.mixer.features.drawn"] == 3
        assert_equal_everywhere(found)
        assert_close(found, expected, atol=1e-6, rtol=1e-6)


def centroids() -> None:
    """Those of clusters, which begin from all that the first step saw."""

    def routing() -> nn.Module:
        return next(case for case in ROWS if case.row.name == "routing_transformer").build().train()

    expected = train_toy(routing(), lambda ids: ids)
    assert expected["model.layers.0.mixer.centroids.steps"] == 3
    for model in (DistributedDataParallel(routing()), by_hand(routing())):
        found = train_toy(model, share)
        assert_equal_everywhere(found)
        assert_close(found, expected, atol=1e-6, rtol=1e-6)


def retnet() -> nn.Module:
    return next(case for case in ROWS if case.row.name == "retnet").build()


def arguments(folder: Path, batch_size: int, **options) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )


def make_trainer(folder: Path, model: nn.Module, **options) -> Trainer:
    """Rows of which unequal parts are asked for, so that a mean of the processes' means would show."""
    ids = some_tokens(32, 12).remainder(32)
    labels = torch.where(torch.arange(12) < torch.arange(32)[:, None] % 8, -100, ids)
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    return Trainer(model=model, args=arguments(folder, **options), train_dataset=rows)


def make_stateful(folder: Path, model: nn.Module, **options) -> StatefulTrainer:
    """Texts of unequal lengths, as four streams."""
    texts = [some_tokens(1, 9 + 7 * (number % 5), seed=number)[0].remainder(32).tolist() for number in range(12)]
    return StatefulTrainer(model, arguments(folder, **options), train_dataset=Segments(texts, 6, rows=4))


def bare_retnet() -> nn.Module:
    return Case(next(case for case in ROWS if case.row.name == "retnet").row, "Model").build()


def make_contrastive(folder: Path, model: nn.Module, **options) -> ContrastiveTrainer:
    """Each row and what comes next in it, and a row that does not fit."""
    texts = some_tokens(32, 18).unflatten(1, (3, 6)).remainder(32)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in texts]

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        ids = {f"{name}_input_ids": torch.stack([row[name] for row in rows]) for name in COLUMNS}
        return ids | {f"{name}_attention_mask": torch.ones(len(rows), 6, dtype=torch.long) for name in COLUMNS}

    told = arguments(folder, remove_unused_columns=False, **options)
    return ContrastiveTrainer(model, told, data_collator=collate, train_dataset=rows)


def trainer(build: Callable[[], nn.Module], make: Callable, folder: Path) -> None:
    """The result is kept, for a process without company to compare with."""
    folder = folder / f"{make.__name__}-{build.__name__}"
    options = {"batch_size": 2, "ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    trained, resumed = make(folder, build(), **options), make(folder / "resumed", build(), **options)
    trained.train()
    assert isinstance(trained.model_wrapped, DistributedDataParallel)
    assert_equal_everywhere(trained.model.state_dict())
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert_close(resumed.model.state_dict(), trained.model.state_dict(), atol=0, rtol=0)
    trained.save_model(str(folder / "joint"))


RECIPE = ["--architecture", "transformer", "--length", "32", "--hidden-size", "32", "--layers", "2", "--max_steps", "3"]
RECIPE += ["--vocab-size", "400", "--save_strategy", "no"]
RECIPE += ["--text", *map(str, sorted(Path(__file__).parent.glob("test_s*.py")))]


def recipe(folder: Path) -> None:
    """examples/pretrain.py: what it finds is kept, for a process without company to compare with."""
    trainers, train, found = [], pretrain.trained, []
    with patch.object(pretrain, "trained", lambda *told: trainers.append(train(*told)) or trainers[-1]):
        for more in ([], ["--sharded"]):
            told = ["--output", str(folder / f"recipe{len(more)}"), "--per_device_train_batch_size", "2", *more]
            found.append(pretrain.main([*RECIPE, *told])["transformer"])
    assert isinstance(trainers[0].model_wrapped, DistributedDataParallel)
    assert_equal_everywhere(trainers[0].model.state_dict())
    for module in trainers[1].model_wrapped.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what an evaluation gathered
    assert_sharded(trainers[1].model_wrapped)
    options, _ = pretrain.read_options([*RECIPE, "--output", str(folder / "split"), "--tensor-parallel", "2"])
    task = pretrain.objective("causal", pretrain.hf_arch.find("transformer"), trainers[0].processing_class, 32)
    model = pretrain.make_model(options, task, PartialState())  # which Trainer takes on GPUs alone
    assert_split(model, model.tp_plan)
    if dist.get_rank() == 0:
        (folder / "recipe.json").write_text(json.dumps(found))


def checks_of(case: Case) -> tuple[Callable[[Case, Path], None], ...]:
    checks = data_parallel, fully_sharded, fully_sharded_by_transformers, tensor_parallel
    return (*checks, expert_parallel, expert_and_data_parallel) if case.config().has_experts else checks


TRAINERS = ((toy, make_trainer), (retnet, make_trainer), (retnet, make_stateful), (bare_retnet, make_contrastive))
CHUNKED = (fully_sharded, tensor_parallel)


def in_chunks(check: Callable, case: Case, folder: Path) -> None:
    with patch.object(heads, "LOGITS_AT_ONCE", 700), patch.object(loss, "LOGITS_AT_ONCE", 700):
        check(case, folder)


def run(check: Callable, *args) -> str:
    try:
        check(*args)
    except Exception:
        return f"process {dist.get_rank()}: {traceback.format_exc()}"
    return ""


def main(folder: Path, names: list[str]) -> None:
    """Processes tell each other through a file how a check went: where one failed alone, the other waits in vain for it
    to take part in some exchange, and what follows would mean nothing."""
    gc.freeze()  # a Trainer collects garbage often
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, patience = dist.FileStore(str(folder / "store"), size), timedelta(seconds=60)
    store.set_timeout(patience)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
    cases = [case for case in CASES if str(case) in names]
    tasks = [
        (str(case), check, (case, folder / f"{case}-{check.__name__}")) for case in cases for check in checks_of(case)
    ]
    tasks += [("toy", training_buffers, ()), ("toy", centroids, ())]
    tasks += [(f"{make.__name__} of {build.__name__}", trainer, (build, make, folder)) for build, make in TRAINERS]
    tasks += [(f"{check.__name__} in chunks", in_chunks, (check, CASES[0], folder / "chunks")) for check in CHUNKED]
    tasks += [("pretraining", recipe, (folder,))]
    report: dict[str, dict[str, str]] = {}
    for name, check, args in tasks:
        store.set(f"{name} {check.__name__} {rank}", run(check, *args))
        told = [store.get(f"{name} {check.__name__} {process}").decode() for process in range(size)]
        report.setdefault(name, {})[check.__name__] = "\n".join(filter(None, told))
        if rank == 0:
            (folder / "report.json").write_text(json.dumps(report))
        if any(told) and not all(told):
            break
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
