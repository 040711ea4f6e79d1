"""Checkpoints of the originals (Llama, GPT-2, BERT, T5, torchscale's RetNet, ...) as models of ours.

What is read is plain tensors: safetensors, or files of torch.save opened with `weights_only=True`. Pickled code never
runs.
"""

import copy
import importlib
import importlib.util
import json
import pickle
import shutil
from inspect import signature
from pathlib import Path

import torch
import transformers
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from hf_arch.architecture import Architecture
from hf_arch.catalogue import ARCHITECTURES, find
from hf_arch.export import TOKENIZER_FILES
from hf_arch.modeling.skeleton.conversion import Conversion
from hf_arch.publish import staged

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt")
WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
TORCH_FILES = ("pytorch_model*", "*.pt", "*.pth", "*.ckpt")
TRAINING_STATE = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")
IN_FLOAT64 = 10**9  # parameters up to which a conversion is verified in float64
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}  # of the largest number; some originals norm in float32 always


def convert(
    source: str | Path,
    architecture: str,
    *,
    head: str | None = None,
    output: str | Path | None = None,
    verify: bool = False,
    **choices,
) -> PreTrainedModel:
    """The model in `source`, in the original's layout, as `architecture` of ours, in eval.

    `source` is a folder or a repository of the Hub; where the original has no config.json, also a file of weights in
    either: a path, or user/repository/file. `head` ("ForCausalLM", "Model", ...) is by default that of the original.
    With `output`, the model is also saved there, with the original's tokenizer and generation config. With `verify`,
    its answers are first compared with those of the original library. `choices` are fields of our config that the
    original leaves open: a warm start of HAT from BERT takes `segment_lengths`, `layer_types`.

    Raises FileNotFoundError where there is no checkpoint, OSError where it is damaged, ValueError where it is of
    another kind, does not fit, or answers otherwise; ImportError where `verify` misses the original library.
    """
    row = find(architecture)
    folder = local_checkpoint(source)
    fields, tensors = read_fields(folder), None
    if fields is None:
        fields, tensors = told_by_tensors(row, folder)
    conversion = conversion_for(row, fields, folder)
    head = head or conversion.head_of(fields)
    model_class = row.load(head)
    if wrong := [name for name in choices if name not in conversion.choices]:
        known = f"; it leaves open {', '.join(conversion.choices)}" if conversion.choices else ""
        raise ValueError(f"{', '.join(wrong)} cannot be chosen: the checkpoint decides it{known}.")
    config = row.load("Config")(**conversion.config(fields, **choices))
    config.name_or_path = str(source)
    tensors = tensors or read_weights(folder)
    model = translated(tensors, fields, conversion, model_class, config)
    if model.can_generate() and (folder / GENERATION_CONFIG_NAME).exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if verify:
        difference = difference_from_original(model, folder, fields, tensors, conversion, head)
        print(f"Largest difference from the original: {difference:.1e}")
    if output is not None:
        with staged(output) as stage:
            model.save_pretrained(stage)
            carry_tokenizer(folder, stage, with_class=conversion.original is None)
    return model


def translated(
    tensors: dict, fields: dict, conversion: Conversion, model_class: type[PreTrainedModel], config
) -> PreTrainedModel:
    """The model of ours that the tensors of an original make, in eval."""
    with torch.device("meta"):
        empty = model_class(config)
    state = conversion.translate(tensors, fields, empty)
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    return model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval()


def from_original(original: PreTrainedModel) -> PreTrainedModel:
    """A model of transformers' own as the first architecture of ours that it can become, with its tensors."""
    fields = original.config.to_dict() | {"architectures": [type(original).__name__]}
    known = ((row, conversion) for row in ARCHITECTURES for conversion in conversions(row) if conversion.takes(fields))
    row, conversion = next(known, (None, None))
    if row is None:
        raise ValueError(f"A {type(original).__name__} is neither of hf_arch, nor can it become a model of it.")
    config, head = row.load("Config")(**conversion.config(fields)), conversion.head_of(fields)
    model = translated(original.state_dict(), fields, conversion, row.load(head), config)
    if model.can_generate():
        model.generation_config = copy.deepcopy(original.generation_config)
    return model.to(original.device).train(original.training)


def carry_tokenizer(folder: Path, stage: Path, with_class: bool) -> None:
    """Copy the tokenizer's files. transformers may know its class by the original's `model_type` alone, which ours is
    not: `with_class` writes it down."""
    files = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)}
    for path in files:
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, stage / path.name)
    if files and with_class:
        AutoTokenizer.from_pretrained(folder).save_pretrained(stage)


def local_checkpoint(source: str | Path) -> Path:
    """The folder or file itself, or what is needed of a repository of the Hub."""
    folder = Path(source).expanduser()
    if folder.exists():
        return folder
    repository, file = str(source), ""
    if repository.count("/") > 1 and repository.endswith(SUFFIXES):
        *names, file = repository.split("/", 2)
        repository = "/".join(names)
    try:
        validate_repo_id(repository)
        if file:
            return Path(hf_hub_download(repository, file))
        chosen = {"ignore_patterns": "*/*"}
        folder = Path(
            snapshot_download(source, allow_patterns=["*.json", *TOKENIZER_FILES, "model*.safetensors"], **chosen)
        )
        if not any(folder.glob("*.safetensors")):
            snapshot_download(source, allow_patterns=list(TORCH_FILES), **chosen)
    except HFValidationError as error:
        raise FileNotFoundError(f"There is no folder {source}.") from error
    except GatedRepoError as error:
        raise PermissionError(
            f"{source} asks for consent: give it on its page of the Hub, then `hf auth login`."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"There is no folder {source}, and no such repository of the Hub can be read."
        ) from error
    return folder


def read_fields(folder: Path) -> dict | None:
    """config.json, of a checkpoint that can be of interest; None where there is none."""
    path = folder / CONFIG_NAME
    if not path.exists():
        if (folder / ADAPTER_CONFIG_NAME).exists():
            raise ValueError(f"{folder} holds an adapter: merge it into its base with the original's library first.")
        return None
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): copy or download it again.") from error
    if fields.get("quantization_config"):
        raise ValueError(f"{folder} is quantised: convert the checkpoint that it was made from, then quantise that.")
    return fields


def conversions(row: Architecture) -> tuple[Conversion, ...]:
    """The originals whose checkpoints can become this architecture."""
    module = f"hf_arch.modeling.{row.family}.{row.name}.conversion_{row.name}"
    return importlib.import_module(module).CONVERSIONS if importlib.util.find_spec(module) else ()


def told_by_tensors(row: Architecture, folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """What config.json would say, of originals that have none, and the tensors that tell it."""
    told = [conversion.describe for conversion in conversions(row) if conversion.describe is not None]
    tensors = read_weights(folder) if told else {}
    for describe in told:
        if fields := describe(tensors):
            return fields, tensors
    if folder.is_file():
        raise NotADirectoryError(
            f"{folder} tells not how large a {row.name} is: give the folder that it lies in, with its {CONFIG_NAME}."
        )
    raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}, which says how large the model is.")


def conversion_for(row: Architecture, fields: dict, folder: Path) -> Conversion:
    found = fields.get("model_type")
    if found in [each.model_type for each in ARCHITECTURES]:
        raise ValueError(f"{folder} is of hf_arch already ({found}): load it with an Auto class.")
    for conversion in conversions(row):
        if conversion.takes(fields):
            return conversion
    known = {each.name: ", ".join(c.model_type for c in conversions(each)) for each in ARCHITECTURES}
    table = "; ".join(f"{name} from {types}" for name, types in known.items() if types)
    raise ValueError(f"{folder} holds a {found!r} checkpoint, which cannot become {row.name!r}. What can: {table}.")


def weight_files(folder: Path) -> list[Path]:
    """The files that make up one checkpoint: transformers' names first, else the only file that can be one."""
    if folder.is_file():
        return [folder]
    for path in (folder / name for name in WEIGHTS):
        if path.exists():
            return shards(path) if path.suffix == ".json" else [path]
    files = [path for suffix in SUFFIXES for path in sorted(folder.glob(f"*{suffix}"))]
    files = [path for path in files if not any(path.match(name) for name in (*TRAINING_STATE, "adapter_model.*"))]
    if len(files) != 1:
        found = f"several: {', '.join(path.name for path in files)}; keep one, or name it" if files else "none"
        raise FileNotFoundError(f"Looking for weights in {folder} ({', '.join(WEIGHTS)}, or one .pt), found {found}.")
    return files


def shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise OSError(f"{index} is damaged ({error!r}): copy or download it again.") from error
    if missing := [name for name in names if not (index.parent / name).exists()]:
        raise FileNotFoundError(
            f"{index} names {len(missing)} files that are not there: {', '.join(missing[:5])}. Copy or download them."
        )
    return [index.parent / name for name in names]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in weight_files(folder):
        tensors |= read_file(path)
    return tensors


def read_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds Python objects beside tensors, which could run code and are not opened. "
            f"Save its state_dict() as safetensors where you trust it. ({str(error).splitlines()[0]})"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise OSError(f"{path} cannot be read ({error}): where it is damaged, copy or download it again.") from error
    for name in ("state_dict", "model"):  # what trainers wrap it in
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise ValueError(f"{path} holds no state_dict: names and tensors were expected.")
    return found


@torch.no_grad()
def difference_from_original(
    model, folder: Path, fields: dict, tensors: dict, conversion: Conversion, head: str
) -> float:
    """The largest difference between the answers to random tokens; raises ValueError where it is too large."""
    dtype = torch.float64 if model.num_parameters() <= IN_FLOAT64 else torch.float32
    ids = torch.randint(model.config.vocab_size, (2, min(32, model.config.max_position_embeddings)))
    told = {"decoder_input_ids": ids[:, :20]} if "decoder_input_ids" in signature(model.forward).parameters else {}
    if conversion.original is not None:
        expected = conversion.original(folder, fields, tensors, head)(ids)
    else:
        name = next(name for name, ours in conversion.heads.items() if ours == head)
        exact = {"dtype": dtype, "experts_implementation": "eager"}  # its grouped products know no float64
        expected = getattr(transformers, name).from_pretrained(folder, **exact).eval()(ids, **told)[0]
    answer = copy.deepcopy(model).to(dtype)(ids, **told)[0]
    difference = (answer - expected).abs().max().item()
    if not difference <= TOLERANCE[expected.dtype] * expected.abs().max().item():
        raise ValueError(f"The converted model answers otherwise than the original, by up to {difference:.1e}.")
    return difference
