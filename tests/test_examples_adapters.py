"""The example of four adapters: what it measures with is right, and in small it runs, pushes, and loads by name."""

import inspect
import json
import os
import random
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

import adapter_tasks
import help_pages
import made_texts
from hub_server import serving

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = """
import adapters
adapters.SIZES.update(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
adapters.VOCABULARY = 400
adapters.STEPS.update(base=3, extraction=2, legal=2, sentiment=2, questions=2)
adapters.main()
"""
TASKS = ["extraction", "legal", "sentiment", "questions"]


def steps(path: str, *, times: int = 3, name="it") -> list:
    """Go some steps.

    Return the steps that were gone. Raise ValueError for none.
    """


def asked() -> list[dict]:
    return list(help_pages.questions("walks", "steps", inspect.signature(steps), inspect.getdoc(steps)))


def test_questions_have_the_answers_of_a_page():
    found = {each["question"]: each["answers"]["text"][0] for each in asked()}
    assert found == {
        "What does walks.steps return?": "steps that were gone",
        "What does walks.steps raise?": "ValueError",
        "What does walks.steps take first?": "path",
        "What is the default of times?": "3",
    }
    for each in [*asked(), *(question for page in help_pages.help_pages().values() for question in page)]:
        (answer,), (start,) = each["answers"]["text"], each["answers"]["answer_start"]
        assert answer and each["context"][start:].startswith(answer)


def test_made_texts_are_labelled_as_they_say():
    draw, labels = random.Random(0), set()
    for held_out in (False, True) * 100:
        record = made_texts.record(draw, held_out)
        for entity in record["entities"]:
            said = record["text"][entity["start"] : entity["end"]]
            labels.add(entity["label"])
            assert said.strip() == said != "" and (entity["label"] != "DOSE" or said.endswith(" mg"))
            if entity["label"] == "DRUG":
                assert (said in made_texts.half(made_texts.DRUGS, True)) == held_out
        assert "{" not in record["text"]
    assert labels == {"PATIENT", "AGE", "DATE", "ILLNESS", "DRUG", "DOSE", "OFTEN", "ALLERGEN"}
    for _ in range(100):
        line = made_texts.headline(draw, False)
        said = line["text"].split(":")[1].split(", ")[0]
        up, good = (any(each in said for each in words) for words in (made_texts.UP, made_texts.GOOD))
        moved = up or any(each in said for each in made_texts.DOWN)
        assert line["label"] == ("neutral" if not moved else "positive" if up == good else "negative")


def test_measures_are_those_of_what_was_found():
    example = {
        "text": "Mr A, 5",
        "entities": [{"start": 0, "end": 4, "label": "P"}, {"start": 6, "end": 7, "label": "N"}],
    }
    said = [{"start": 0, "end": 4, "entity_group": "P"}, {"start": 5, "end": 7, "entity_group": "N"}]  # with its blank
    assert adapter_tasks.score_entities(lambda *_, **__: [said], [example]) == {"F1": 1.0}
    assert adapter_tasks.score_entities(lambda *_, **__: [said[:1]], [example])["F1"] == pytest.approx(2 / 3)
    assert adapter_tasks.score_labels(lambda *_, **__: [{"label": "x"}], [{"text": "", "label": "x"}])["accuracy"] == 1
    right = adapter_tasks.score_answers(["steps that were", "ValueError"], asked()[:2])
    assert right == {"exact": 0.5, "F1": pytest.approx((6 / 7 + 1) / 2)}


def test_simple_ways_learn_what_they_can():
    records = [made_texts.record(random.Random(i), False) for i in range(40)]
    found = adapter_tasks.extraction_baselines(None, records, records)
    assert found["guess"]["F1"] == 0 and 0.5 < found["words"]["F1"] < 1  # a drug that is taken, or is not borne
    lines = [{"text": "up", "label": "good"}] * 3 + [{"text": "down", "label": "bad"}]
    found = adapter_tasks.label_baselines(None, lines, lines)
    assert found == {"guess": {"accuracy": 0.75}, "words": {"accuracy": 1.0}}
    found = adapter_tasks.question_baselines(None, [], asked()[:1])
    assert found["guess"]["F1"] < 0.1 < found["words"]["F1"]


def write(path: Path, examples: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(each) for each in examples))
    return str(path)


def test_in_small_it_pushes_and_loads_by_name(tmp_path):
    draw = random.Random(0)
    given = {
        "--records": [made_texts.record(draw, False) for _ in range(20)],
        "--news": [made_texts.headline(draw, False) for _ in range(30)],
        "--questions": asked() * 3,
    }
    told = [part for name, examples in given.items() for part in (name, write(tmp_path / name[2:], examples))]
    licence = next(file for file in distribution("transformers").files if file.name == "LICENSE").locate()
    law = Path(licence).read_text("utf-8")
    (tmp_path / "law").write_text(law + "".join(f"\n\n{i} {law[i * 90 : i * 90 + 500]}" for i in range(30)))
    told += ["--text", str(tmp_path / "law"), "--push", "ann/base", "--output", str(tmp_path / "out")]
    with serving() as hub:
        client = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_ann", "HF_HUB_DISABLE_XET": "1"}
        client |= {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES)}
        command = [sys.executable, "-W", "ignore", "-c", SMALL, *told]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | client, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        files = {name: repository.commits[repository.refs["main"]] for name, repository in hub.repositories.items()}
    assert files.keys() == {"ann/base", *(f"ann/base-{task}" for task in TASKS)}
    for task in TASKS:
        config = json.loads(files[f"ann/base-{task}"]["adapter_config.json"])
        assert config["base_model_name_or_path"] == "ann/base" and config["r"] == 8
    table = [line.split() for line in done.stdout.splitlines()]
    header = table.index(["task", "measure", "guess", "words", "adapter", "multi-task"])
    rows = table[header + 1 : header + 6]
    assert [row[0] for row in rows] == [*TASKS, "questions"]
    assert all(0 <= float(number) < 20 for row in rows for number in row[-4:])
    assert "The base is as it was." in done.stdout
