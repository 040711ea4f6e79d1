"""A kill at any moment of a save leaves a folder that loads, with the old weights or with the new."""

import json
import os
import signal

import pytest
import torch

from hf_arch import find
from hf_arch.publish import is_weights, staged

SINGLE, SHARDED, OTHERWISE_SHARDED = "1GB", "50KB", "30KB"


def tiny(seed, name="transformer", **fields):
    torch.manual_seed(seed)
    row = find(name)
    return row.load("ForCausalLM")(row.tiny_config("ForCausalLM", **fields))


@pytest.fixture(scope="module")
def old():
    return tiny(0)


@pytest.fixture(scope="module")
def new():
    return tiny(1)


def save(model, folder, size=SINGLE):
    with staged(folder) as stage:
        model.save_pretrained(stage, max_shard_size=size)


def save_and_die(model, folder, size, steps):
    """Save in a process that is killed before its file operation number `steps`; whether it came so far."""
    child = os.fork()
    if child == 0:
        left = iter(range(steps))

        def dying(operation):
            def call(*args, **kwargs):
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return operation(*args, **kwargs)

            return call

        for name in ("replace", "rename", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        save(model, folder, size)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def weights(folder):
    """What from_pretrained reads; fails where it would have to invent a tensor."""
    model, told = find("transformer").load("ForCausalLM").from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    return model.state_dict()


def equal(state, model):
    other = model.state_dict()
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


def weight_files(folder):
    return sorted(path.name for path in folder.iterdir() if is_weights(path.name))


def named_by_index(folder):
    index = folder / "model.safetensors.index.json"
    return sorted({index.name, *json.loads(index.read_text())["weight_map"].values()})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (SINGLE, SINGLE),
        (SINGLE, SHARDED),
        (SHARDED, SINGLE),
        (SHARDED, SHARDED),
        (SHARDED, OTHERWISE_SHARDED),
        (OTHERWISE_SHARDED, SHARDED),
    ],
)
def test_a_kill_leaves_the_old_model_or_the_new(before, after, old, new, tmp_path):
    turned, killed = [], True
    while killed:
        folder = tmp_path / str(len(turned))
        save(old, folder, before)
        (folder / "notes.txt").write_text("mine")
        killed = save_and_die(new, folder, after, steps=len(turned))
        found = weights(folder)
        turned.append(equal(found, new))
        assert turned[-1] or equal(found, old)

        save(new, folder, after)  # the next save takes up what the killed one left
        assert equal(weights(folder), new)
        assert weight_files(folder) == (["model.safetensors"] if after == SINGLE else named_by_index(folder))
        assert (folder / "notes.txt").read_text() == "mine"
        assert not list(tmp_path.glob(".*.stage"))
    assert turned == sorted(turned) and not turned[0] and turned[-1]  # one step turns the old into the new


def test_a_new_folder_appears_whole_or_not_at_all(new, tmp_path):
    assert save_and_die(new, tmp_path / "model", SHARDED, steps=0)
    assert [path.suffix for path in tmp_path.iterdir()] == [".stage"]
    save(new, tmp_path / "model", SHARDED)
    assert equal(weights(tmp_path / "model"), new)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_error_leaves_the_folder_as_it_was(old, new, tmp_path):
    save(old, tmp_path / "model")
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "model") as stage:
        new.save_pretrained(stage)
        raise KeyboardInterrupt
    assert equal(weights(tmp_path / "model"), old)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "other", [{"name": "retnet"}, {"hidden_size": 16}, {"num_hidden_layers": 1}], ids=["type", "shapes", "names"]
)
def test_another_model_is_refused(other, old, tmp_path):
    save(old, tmp_path)
    with pytest.raises(ValueError, match="Choose another folder"):
        save(tiny(2, **other), tmp_path)
    assert equal(weights(tmp_path), old)


def test_an_adapter_is_refused(new, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter"):
        save(new, tmp_path)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"), staged(tmp_path / "model"):
        pass


def test_folders_inside_are_kept_and_joined(old, new, tmp_path):
    save(old, tmp_path / "model")
    (tmp_path / "model/extra").mkdir()
    (tmp_path / "model/extra/notes.txt").write_text("mine")
    with staged(tmp_path / "model") as stage:
        new.save_pretrained(stage)
        (stage / "extra").mkdir()
        (stage / "extra/template.jinja").write_text("new")
    assert (tmp_path / "model/extra/notes.txt").read_text() == "mine"
    assert (tmp_path / "model/extra/template.jinja").read_text() == "new"


def test_a_stage_of_a_running_process_is_left_alone(new, tmp_path):
    with staged(tmp_path / "model") as stage:
        save(new, tmp_path / "model")
        assert stage.exists()
        new.save_pretrained(stage)
    assert equal(weights(tmp_path / "model"), new)
