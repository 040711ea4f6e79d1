"""Run as a program whose HF_ENDPOINT is the Hub of the tests: push all there is, load it with hf_arch, be refused."""

import os
from pathlib import Path

import torch
import transformers
from huggingface_hub import HfApi
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from alone import answer
from hf_arch import ARCHITECTURES, find
from hf_arch.architecture import AUTO_CLASSES
from hf_arch.export import push_to_hub
from promises import Case

CASES = {row.name: Case(row, row.heads[-1]) for row in ARCHITECTURES}
RETNET = Case(find("retnet"), "ForCausalLM")


def push_each_row() -> dict[str, dict[str, torch.Tensor]]:
    """Push a model of each row, and load it as a user of hf_arch does; what each says."""
    said = {}
    for name, case in CASES.items():
        push_to_hub(case.build(), f"ann/{name}")
        said[name] = answer(getattr(transformers, AUTO_CLASSES[case.head]).from_pretrained(f"ann/{name}"))
    return said


def push_again_and_again(old, new) -> None:
    """One repository for each thing that can happen to it."""
    words = transformers.TokenizersBackend(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    push_to_hub(old, "ann/resharded", max_shard_size="50KB")
    HfApi().create_tag("ann/resharded", tag="v1")
    push_to_hub(new, "ann/resharded")
    push_to_hub(new, "ann/resharded")  # nothing is new: no commit
    push_to_hub(new, "ann/private", private=True)
    push_to_hub(old, "ann/branched")
    push_to_hub(new, "ann/branched", revision="trained", tokenizer=words, commit_message="Trained")

    push_to_hub(old, "ann/described")
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="README.md", repo_id="ann/described")
    push_to_hub(new, "ann/described")

    push_to_hub(transformers.AutoModelForCausalLM.from_pretrained("ann/branched"), "ann/derived")

    push_to_hub(old, "ann/interrupted")
    upload = HfApi.preupload_lfs_files
    HfApi.preupload_lfs_files = lambda *args, **kwargs: [upload(*args, **kwargs), 1 / 0]
    refused(push_to_hub, new, "ann/interrupted")
    HfApi.preupload_lfs_files = upload


def refused(push, *args, **options) -> str:
    try:
        push(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def be_refused(model) -> dict[str, str]:
    """What a user reads who may not push."""
    push_to_hub(model, "bob/public", token="hf_bob")
    said = {
        "foreign": refused(push_to_hub, model, "bob/mine"),
        "foreign and public": refused(push_to_hub, model, "bob/public"),
        "bad token": refused(push_to_hub, model, "ann/mine", token="hf_nobody"),
        "bad name": refused(push_to_hub, model, "ann/mine/again"),
    }
    del os.environ["HF_TOKEN"]
    return said | {"no token": refused(push_to_hub, model, "ann/mine")}


if __name__ == "__main__":
    old, new = RETNET.build(), RETNET.build()
    new.lm_head.weight.data += 1
    said = {"rows": push_each_row(), "old": answer(old), "new": answer(new)}
    push_again_and_again(old, new)
    torch.save(said | {"refused": be_refused(old)}, Path("said.pt"))
