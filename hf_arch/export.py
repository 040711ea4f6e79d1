"""Checkpoints that load without this package, through `trust_remote_code`: in a folder, or in a repository of the Hub.

Beside what `save_pretrained` writes they hold their code, joined from our sources, and a model card. A card that is
there already is the user's, and stays.
"""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, PROCESSOR_NAME

from hf_arch.architecture import AUTO_CLASSES, Architecture
from hf_arch.bundle import bundle
from hf_arch.card import model_card
from hf_arch.catalogue import ARCHITECTURES
from hf_arch.publish import is_weights, staged

CARD = "README.md"

TOKENIZER_FILES = (
    "tokenizer*",
    "tokenization_*.py",
    "vocab.*",
    "merges.txt",
    "*.model",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates",
    PROCESSOR_NAME,
)


def export(
    model_or_folder: PreTrainedModel | str | Path,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    max_shard_size: int | str = "50GB",
) -> Path:
    """Write a model of ours, live or saved in a folder, as a checkpoint that loads without hf_arch; answer `folder`.

    A saved model brings its tokenizer and its model card. Other files in `folder` stay, and it changes all at once.
    Raises ValueError for a model that is not ours, an adapter, or a `folder` that holds another model.
    """
    model, folder = loaded(model_or_folder), Path(folder).resolve()
    with staged(folder) as stage:
        write(model, stage, folder.name, tokenizer, max_shard_size)
        bring_along(model_or_folder, stage, with_tokenizer=tokenizer is None)
        name_processor(stage, row_of(model.config.model_type))
        if (folder / CARD).exists():
            (stage / CARD).unlink()
    return folder


def push_to_hub(
    model_or_folder: PreTrainedModel | str | Path,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model with hf_arch",
    token: str | None = None,
    max_shard_size: int | str = "50GB",
) -> str:
    """Export into the repository `repo_id` of the Hub, in one commit on branch `revision`; answer its address.

    The repository (`private` or not) and the branch are made where they are missing. Raises PermissionError without a
    token, or with one that may not write there, and ValueError as `export` does or for an impossible `repo_id`.
    """
    if token is None and get_token() is None:
        raise PermissionError("The Hub asks who is writing: run `hf auth login`, set HF_TOKEN, or give `token`.")
    model, api = loaded(model_or_folder), HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
        with TemporaryDirectory() as folder:
            write(model, Path(folder), repo.repo_id, tokenizer, max_shard_size)
            bring_along(model_or_folder, Path(folder), with_tokenizer=tokenizer is None)
            name_processor(Path(folder), row_of(model.config.model_type))
            there = set(api.list_repo_files(repo.repo_id, revision=revision))
            operations = changes(Path(folder), there)
            api.create_commit(repo.repo_id, operations, commit_message=commit_message, revision=revision)
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise PermissionError(
            f"This token may not write to {repo_id}: take a repository of your own, or a token with write access."
        ) from error
    return str(repo)


def loaded(model_or_folder: PreTrainedModel | str | Path) -> PreTrainedModel:
    """The model, from its folder if need be. Raises ValueError where it is not one of ours, or an adapter."""
    if isinstance(model_or_folder, str | Path):
        folder = Path(model_or_folder)
        if (folder / ADAPTER_CONFIG_NAME).exists():
            raise ValueError(
                f"{folder} holds an adapter, which loads on its base without code of its own. To export both as one "
                "model, load it with PeftModel.from_pretrained and give what merge_and_unload() returns."
            )
        if not (folder / CONFIG_NAME).exists():
            raise FileNotFoundError(f"{folder} holds no model: there is no {CONFIG_NAME} in it.")
        config = AutoConfig.from_pretrained(folder)
        row = row_of(config.model_type)
        return row.load(head_of(config.architectures, row)).from_pretrained(folder)
    model = model_or_folder
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("The model carries an adapter: export what its merge_and_unload() returns.")
    row_of(model.config.model_type)
    return model


def row_of(model_type: str) -> Architecture:
    for row in ARCHITECTURES:
        if row.model_type == model_type:
            return row
    raise ValueError(f"{model_type!r} is no architecture of hf_arch. `hf-arch list` shows those that are.")


def head_of(architectures: list[str] | None, row: Architecture) -> str:
    """The head that config.json names; a config that names none has no head."""
    return architectures[0].removeprefix(row.prefix) if architectures else "Model"


def write(model: PreTrainedModel, folder: Path, name: str, tokenizer, max_shard_size: int | str) -> None:
    """Write the checkpoint, its code and its card into `folder`; `name` is where readers will load it from."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    row = row_of(model.config.model_type)
    for file, text in bundle(row).items():
        (folder / file).write_text(text, encoding="utf-8")
    config = json.loads((folder / CONFIG_NAME).read_text())
    config["auto_map"] = {"AutoConfig": f"configuration_{row.name}.{row.prefix}Config"} | {
        AUTO_CLASSES[head]: f"modeling_{row.name}.{row.prefix}{head}" for head in row.heads
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    model_card(model, row, head_of(config["architectures"], row), name).save(folder / CARD)


def bring_along(source: PreTrainedModel | str | Path, folder: Path, with_tokenizer: bool) -> None:
    """Copy the tokenizer and the model card of a saved model."""
    if not isinstance(source, str | Path):
        return
    for path in Path(source).iterdir():
        if path.name == CARD or (with_tokenizer and any(path.match(pattern) for pattern in TOKENIZER_FILES)):
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, folder / path.name)


def name_processor(folder: Path, row: Architecture) -> None:
    """Say in the processor's own file, if there is one, where its code is."""
    path = folder / PROCESSOR_NAME
    if row.processor and path.exists():
        fields = json.loads(path.read_text())
        fields["auto_map"] = {"AutoProcessor": f"processing_{row.name}.{row.prefix}Processor"}
        path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def changes(folder: Path, there: set[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What turns a repository that holds the files `there` into `folder`: its old weights go, its card stays."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    added = [CommitOperationAdd(name, path) for name, path in files.items() if name != CARD or CARD not in there]
    return added + [CommitOperationDelete(name) for name in there - files.keys() if is_weights(name)]
