"""What is pushed is there whole, and loads from there with hf_arch and without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from alone import ask_alone
from hf_arch import ARCHITECTURES
from hf_arch.architecture import AUTO_CLASSES
from hub_server import serving
from promises import EXACT

PULLED = {
    "resharded": ("new", {}),
    "v1": ("old", {"source": "ann/resharded", "revision": "v1"}),
    "private": ("new", {}),
    "branched": ("old", {}),
    "trained": ("new", {"source": "ann/branched", "revision": "trained"}),
    "described": ("new", {}),
    "interrupted": ("old", {}),
}
HIDDEN = {
    "private to bob": {"source": "ann/private", "token": "hf_bob"},
    "private to all": {"source": "ann/private", "token": False},
    "unknown": {"source": "ann/unknown"},
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The Hub after all is pushed, what its pusher says, and what models loaded from it without hf_arch say."""
    folder = tmp_path_factory.mktemp("hub")
    causal = {
        name: {"auto": "AutoModelForCausalLM", "source": f"ann/{name}"} | job for name, (_, job) in PULLED.items()
    }
    causal |= {name: {"auto": "AutoModelForCausalLM"} | job for name, job in HIDDEN.items()}
    rows = {row.name: {"auto": AUTO_CLASSES[row.heads[-1]], "source": f"ann/{row.name}"} for row in ARCHITECTURES}
    with serving() as hub:
        client = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_ann", "HF_HUB_DISABLE_XET": "1"}
        environment = os.environ | client | {"HF_HOME": str(folder / "pusher"), "OMP_NUM_THREADS": "1"}
        pusher = Path(__file__).with_name("pusher.py")
        subprocess.run([sys.executable, pusher], cwd=folder, env=environment, check=True)
        yield hub, torch.load(folder / "said.pt"), ask_alone(causal | rows, folder, **client)


def files(hub, name, revision="main"):
    repository = hub.repositories[f"ann/{name}"]
    return repository.commits[repository.refs[revision]]


@pytest.mark.parametrize("name", [row.name for row in ARCHITECTURES])
def test_a_row_loads_with_hf_arch_and_without(name, hub):
    _, said, alone = hub
    assert not isinstance(alone[name], str), alone[name]
    torch.testing.assert_close(alone[name], said["rows"][name], **EXACT)


@pytest.mark.parametrize("name", PULLED)
def test_what_is_pulled_is_what_was_pushed(name, hub):
    _, said, alone = hub
    assert not isinstance(alone[name], str), alone[name]
    torch.testing.assert_close(alone[name], said[PULLED[name][0]], **EXACT)


def test_a_push_is_one_commit_and_leaves_no_old_weights(hub):
    first, sharded, single = hub[0].repositories["ann/resharded"].commits.values()
    shards = set(json.loads(sharded["model.safetensors.index.json"])["weight_map"].values())
    assert len(shards) > 1 and {path for path in sharded if path.endswith(".safetensors")} == shards
    assert {path for path in single if "safetensors" in path} == {"model.safetensors"}
    assert {"config.json", "modeling_retnet.py", "configuration_retnet.py", "generation_config.json"} < single.keys()


def test_a_repository_is_private_where_asked(hub):
    assert hub[0].repositories["ann/private"].private and not hub[0].repositories["ann/branched"].private


def test_a_branch_leaves_main_alone(hub):
    assert "tokenizer.json" in files(hub[0], "branched", "trained") and "tokenizer.json" not in files(
        hub[0], "branched"
    )


def test_the_card_names_the_repository_and_its_origin_and_a_users_card_stays(hub):
    assert '.from_pretrained("ann/branched", trust_remote_code=True)' in files(hub[0], "branched")["README.md"].decode()
    _, metadata, _ = files(hub[0], "derived")["README.md"].decode().split("---\n")
    assert yaml.safe_load(metadata)["base_model"] == "ann/branched"
    assert files(hub[0], "described")["README.md"] == b"mine"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("foreign", "PermissionError: This token may not write to bob/mine"),
        ("foreign and public", "PermissionError: This token may not write to bob/public"),
        ("bad token", "PermissionError: This token may not write to ann/mine"),
        ("bad name", "HFValidationError: Repo id must be in the form"),
        ("no token", "PermissionError: The Hub asks who is writing: run `hf auth login`"),
    ],
)
def test_who_may_not_push_is_told_why(case, words, hub):
    assert hub[1]["refused"][case].startswith(words)
    assert not {"bob/mine", "ann/mine"} & hub[0].repositories.keys()


@pytest.mark.parametrize("name", HIDDEN)
def test_what_one_may_not_read_does_not_load(name, hub):
    assert "is not a local folder and is not a valid model identifier" in hub[2][name]
