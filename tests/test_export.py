"""An exported folder loads where hf_arch cannot be imported, and answers alike."""

import ast
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import metadata_load
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaModel, TokenizersBackend

from alone import answer, ask_alone
from hf_arch import find
from hf_arch.architecture import AUTO_CLASSES
from hf_arch.bundle import in_order, join, refuse_collisions
from hf_arch.export import export
from promises import EXACT, HEADS, Case

RETNET = Case(find("retnet"), "ForCausalLM")
ADAPTED = ["AutoModelForCausalLM", "AutoPeftModelForCausalLM"]
RESAVED = "resaved"
MODELING = Path(__file__).parents[1] / "modeling"


@pytest.fixture(scope="module")
def model():
    return RETNET.build()


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    return TokenizersBackend(tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each exported model, an adapter on one, and one that is saved again say here, and what they say alone."""
    folder, here, jobs = tmp_path_factory.mktemp("exported"), {}, {}
    for case in HEADS:
        model = case.build()
        source = export(model, folder / case.head / case.row.name)
        here[str(case)], jobs[str(case)] = answer(model), {"auto": AUTO_CLASSES[case.head], "source": str(source)}
    jobs[RESAVED] = jobs[str(RETNET)] | {"resave": str(folder / RESAVED)}
    here[RESAVED] = here[str(RETNET)]

    base = AutoModelForCausalLM.from_pretrained(jobs[str(RETNET)]["source"])
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    for auto in ADAPTED:
        here[auto], jobs[auto] = answer(adapted), {"auto": auto, "source": str(folder / "adapter")}
    return here, ask_alone(jobs, folder, HF_HUB_OFFLINE="1")


@pytest.mark.parametrize("name", [*map(str, HEADS), RESAVED, *ADAPTED])
def test_it_answers_alike_without_the_package(name, answers):
    here, alone = (found[name] for found in answers)
    assert not isinstance(alone, str), alone
    torch.testing.assert_close(alone, here, **EXACT)


def test_it_loads_with_the_package_without_trust(model, tmp_path):
    export(model, tmp_path)
    torch.testing.assert_close(answer(AutoModelForCausalLM.from_pretrained(tmp_path)), answer(model), **EXACT)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_saved_model_brings_its_tokenizer_and_its_card(in_place, tokenizer, tmp_path):
    model = RETNET.build(torch.bfloat16)
    saved, exported = tmp_path / "saved", tmp_path / ("saved" if in_place else "exported")
    model.save_pretrained(saved, max_shard_size="20KB")
    tokenizer.save_pretrained(saved)
    (saved / "README.md").write_text("mine")
    (saved / "optimizer.pt").write_text("no part of a model")

    export(saved, exported)
    found = AutoModelForCausalLM.from_pretrained(exported)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(answer(found), answer(model))
    assert AutoTokenizer.from_pretrained(exported)("a b").input_ids == [1, 2]
    assert (exported / "README.md").read_text() == "mine"
    assert (exported / "optimizer.pt").exists() == in_place
    assert "auto_map" in json.loads((exported / "config.json").read_text())


def test_a_tokenizer_can_be_given(model, tokenizer, tmp_path):
    export(model, tmp_path, tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path)("b a").input_ids == [2, 1]


def test_large_models_are_sharded(model, tmp_path):
    export(model, tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(answer(AutoModelForCausalLM.from_pretrained(tmp_path)), answer(model), **EXACT)


def test_the_card_says_what_it_is(model, tmp_path):
    export(model, tmp_path / "my-retnet")
    card = tmp_path / "my-retnet/README.md"
    assert metadata_load(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hf_arch", "state_space", "retnet"],
    }
    for words in ("# my-retnet", "https://arxiv.org/abs/2307.08621", f"{model.num_parameters():,} parameters"):
        assert words in card.read_text()
    card.write_text("mine")
    export(model, tmp_path / "my-retnet")
    assert card.read_text() == "mine"


def test_an_adapter_is_refused(tmp_path):
    adapted = get_peft_model(RETNET.build(), LoraConfig())
    adapted.save_pretrained(tmp_path)
    for source in (adapted, adapted.get_base_model(), tmp_path):
        with pytest.raises(ValueError, match="merge_and_unload"):
            export(source, tmp_path / "exported")
    export(adapted.merge_and_unload(), tmp_path / "exported")


def test_what_is_not_ours_is_refused(model, tmp_path):
    tiny = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    llama = LlamaModel(LlamaConfig(**tiny))
    llama.save_pretrained(tmp_path / "llama")
    for source in (llama, tmp_path / "llama"):
        with pytest.raises(ValueError, match="'llama' is no architecture of hf_arch"):
            export(source, tmp_path / "exported")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        export(tmp_path, tmp_path / "exported")
    with pytest.raises(ValueError, match="Choose another folder"):
        export(model, tmp_path / "llama")
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """Writes modules `below` and `above`, and answers with them in the order in which they would be joined."""
    monkeypatch.syspath_prepend(tmp_path.parent)

    def write(below, above):
        (tmp_path / "below.py").write_text(below)
        (tmp_path / "above.py").write_text(above)
        return in_order(f"{tmp_path.name}.above").values()

    return write


def test_joined_modules_keep_comments_and_effects(ours):
    uses = 'from .below import TABLE, half\n\n# Filled here\nTABLE["pi"] = half(math.pi)\n'
    below = '"""Halves."""\n\nimport math\n\nTABLE = {}\n\n\ndef half(x):  # exactly\n    return x / 2\n'
    above = f'"""Uses them."""\n\nimport math\n\n{uses}'
    text = join(ours(below, above))
    assert text.count("import math") == 1 and "from .below" not in text
    for words in ('"""Uses them."""', "# Halves.", "# exactly", "# Filled here"):
        assert words in text
    found = {}
    exec(text, found)
    assert found["TABLE"]["pi"] == found["math"].pi / 2


@pytest.mark.parametrize(
    ("below", "above", "named"),
    [
        ("def f(): ...", "class f: ...", "below.f and .*above.f"),
        ("f = 1", "from math import floor as f", "below.f and math.floor"),
        ("import math as f", "import cmath as f", "math and cmath"),
    ],
)
def test_names_that_collide_are_refused(below, above, named, ours):
    with pytest.raises(ValueError, match=named):
        refuse_collisions(ours(f"{below}\nX = 1\n", f"from .below import X\n{above}\n"))


def test_names_at_the_top_are_unique():
    """Any two files of models may be joined into one; conversions never are."""
    found = {}
    files = [path for path in MODELING.rglob("*.py") if not path.name.startswith("conversion_")]
    for path in files:
        for part in ast.parse(path.read_text()).body:
            targets = getattr(part, "targets", [])
            names = [part.name] if hasattr(part, "name") else [t.id for t in targets if isinstance(t, ast.Name)]
            for name in names:
                found.setdefault(name, []).append(path.name)
    assert len(files) > 100 and not {name: paths for name, paths in found.items() if len(paths) > 1}
