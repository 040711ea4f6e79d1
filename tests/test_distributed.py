"""Promise 10: two processes are one. A pair runs the checks of distributed_worker.py once; here are its answers."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_worker import CASES, CHUNKED, RECIPE, TRAINERS, checks_of, pretrain
from filelock import FileLock
from safetensors.torch import load_file
from torch.testing import assert_close

LIMIT = 1500  # seconds for all rows, on a machine that does much else


def run_pair(folder: Path, names: list[str]) -> None:
    command = [sys.executable, str(Path(__file__).with_name("distributed_worker.py")), str(folder), *names]
    told = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    told |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    pair = []
    for rank in ("0", "1"):
        environment = os.environ | told | {"RANK": rank, "LOCAL_RANK": rank}
        with open(folder / f"process-{rank}.log", "w") as log:
            pair.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    with contextlib.suppress(subprocess.TimeoutExpired):  # the report then lacks what did not run
        for process in pair:
            process.wait(LIMIT)
    for process in pair:
        process.kill()


@pytest.fixture(scope="session")
def folder(request, tmp_path_factory) -> Path:
    """Where the pair reported on the cases that this session is to test; one pair, however many processes test."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "distributed"
    with FileLock(root / "distributed.lock"):
        if not folder.exists():
            folder.mkdir()
            chosen = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
            run_pair(
                folder, sorted({str(params["distributed_case"]) for params in chosen if "distributed_case" in params})
            )
    return folder


def assert_passed(folder: Path, case: str, check: str) -> None:
    report = json.loads((folder / "report.json").read_text()) if (folder / "report.json").exists() else {}
    told = report.get(case, {}).get(check)
    if told is None:
        told = "did not run: " + (folder / "process-0.log").read_text()[-3000:]
    assert not told, told


@pytest.mark.parametrize(
    "distributed_case, check", [(case, check.__name__) for case in CASES for check in checks_of(case)], ids=str
)
def test_two_processes_are_one(folder, distributed_case, check):
    assert_passed(folder, str(distributed_case), check)


@pytest.mark.parametrize("check", [check.__name__ for check in CHUNKED])
def test_the_loss_in_chunks_is_split_alike(folder, check):
    assert_passed(folder, f"{check} in chunks", "in_chunks")


@pytest.mark.parametrize("check", ["training_buffers", "centroids"])
def test_training_buffers_are_alike_and_those_of_one_process(folder, check):
    assert_passed(folder, "toy", check)


@pytest.mark.parametrize("build, make", TRAINERS)
def test_a_trainer_in_two_processes_is_one_with_large_batches(folder, build, make, tmp_path):
    """Each process of a StatefulTrainer has streams and a memory of its own."""
    assert_passed(folder, f"{make.__name__} of {build.__name__}", "trainer")
    alone = make(tmp_path, build(), batch_size=4)
    alone.train()
    joint = load_file(folder / f"{make.__name__}-{build.__name__}" / "joint" / "model.safetensors")
    assert_close(joint, alone.model.state_dict(), atol=1e-7, rtol=1e-6)


def test_the_recipe_in_two_processes_is_one_with_large_batches(folder, tmp_path):
    assert_passed(folder, "pretraining", "recipe")
    alone = pretrain.main([*RECIPE, "--output", str(tmp_path), "--per_device_train_batch_size", "4"])["transformer"]
    assert json.loads((folder / "recipe.json").read_text()) == pytest.approx([alone, alone], rel=1e-5)
