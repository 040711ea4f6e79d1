"""Checkpoint folders that change all at once: a kill at any moment leaves the old model or the new one, never a mix.

A checkpoint is written into a stage, a folder beside its target, and moves when it is whole. Where the target is there
already, one step decides which weights `from_pretrained` reads: it takes model.safetensors where there is one, else
the shards that the index names.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import get_local_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

SHARD = re.compile(r"model(-\w+)?-\d{5}-of-\d{5}\.safetensors")


@contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """A fresh folder to write a whole checkpoint into; when the block ends well, its files become those of `folder`.

    Other files in `folder` stay. Raises ValueError where it holds another model; after an error in the block, `folder`
    is as it was.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a checkpoint is a folder.")
    stage = stage_beside(folder)
    stage.mkdir(parents=True)
    try:
        yield stage
        publish(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def staged_file(path: str | Path) -> Iterator[Path]:
    """The name of a file to write; when the block ends well, it takes the place of `path`, in one step."""
    path = Path(path).resolve()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = stage_beside(path)
    try:
        yield stage
        os.replace(stage, path)
    finally:
        stage.unlink(missing_ok=True)


def stage_beside(target: Path) -> Path:
    """A fresh name beside `target`, of this process."""
    remove_abandoned_stages(target)
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.stage")


def publish(stage: Path, folder: Path) -> None:
    """Move the checkpoint in `stage` to `folder`, or into it."""
    if not folder.exists():
        os.rename(stage, folder)
        return
    refuse_another_model(stage, folder)
    name_shards_apart(stage, folder)
    new = sorted((path.relative_to(stage) for path in stage.rglob("*") if path.is_file()), key=turn)
    stale = [path for path in folder.iterdir() if is_weights(path.name) and Path(path.name) not in new]
    for file in new:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(stage / file, folder / file)
    for path in stale:
        os.unlink(path)


def is_weights(name: str) -> bool:
    """Whether save_pretrained writes weights, or their index, under this name."""
    return name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME) or SHARD.fullmatch(name) is not None


def turn(file: Path) -> int:
    """When a file moves: weights, their index, all else, config.json."""
    if file.name == SAFE_WEIGHTS_INDEX_NAME:
        return 1
    return 0 if is_weights(file.name) else 3 if file.name == CONFIG_NAME else 2


def refuse_another_model(stage: Path, folder: Path) -> None:
    """Raise ValueError where `folder` holds a model of another type, or weights of other names or shapes."""
    held, shapes = model_type(folder), tensor_shapes(folder)
    if (folder / ADAPTER_CONFIG_NAME).exists():
        found = "an adapter"
    elif held is not None and held != model_type(stage):
        found = f"a model of type {held!r}, not {model_type(stage)!r}"
    elif shapes is not None and shapes != tensor_shapes(stage):
        found = "a model whose weights have other names or shapes"
    else:
        return
    raise ValueError(f"{folder} holds {found}. Choose another folder, or remove this one first.")


def model_type(folder: Path) -> str | None:
    """What config.json says, or None where there is none."""
    config = folder / CONFIG_NAME
    return json.loads(config.read_text()).get("model_type") if config.exists() else None


def tensor_shapes(folder: Path) -> dict[str, list[int]] | None:
    """The shape of each tensor that from_pretrained would read, or None where there are no weights."""
    try:
        files = get_local_safetensors_metadata(folder).files_metadata.values()
    except NotASafetensorsRepoError:
        return None
    return {name: tensor.shape for file in files for name, tensor in file.tensors.items()}


def name_shards_apart(stage: Path, folder: Path) -> None:
    """Give the new shards names that no file in `folder` has, so that the index alone decides which are read."""
    shards = [path for path in stage.iterdir() if SHARD.fullmatch(path.name)]
    if not any((folder / shard.name).exists() for shard in shards):
        return
    mark = f"model-{secrets.token_hex(4)}-"
    index = json.loads((stage / SAFE_WEIGHTS_INDEX_NAME).read_text())
    index["weight_map"] = {key: name.replace("model-", mark, 1) for key, name in index["weight_map"].items()}
    (stage / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for shard in shards:
        os.rename(shard, shard.with_name(shard.name.replace("model-", mark, 1)))


def remove_abandoned_stages(folder: Path) -> None:
    """Remove what killed processes left of their stages for `folder`, or a file; the process is in a stage's name."""
    stage_name = re.compile(rf"\.{re.escape(folder.name)}\.(\d+)-[0-9a-f]{{8}}\.stage")
    for path in folder.parent.iterdir() if folder.parent.exists() else ():
        found = stage_name.fullmatch(path.name)
        if found and not is_running(int(found[1])):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, as another user
    return True
