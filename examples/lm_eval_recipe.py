"""lm-eval measures a model of ours: `python examples/lm_eval_recipe.py MODEL`, after `pip install 'hf-arch[evaluate]'`.

MODEL is a folder with a causal language model and its tokenizer, such as hf_arch_demo/retnet/base that `hf-arch demo`
writes. The tasks are three of our own, one of each kind that lm-eval knows, in files that this script writes, so that
nothing is downloaded; those of lm-eval run the same way, by their names in `tasks` and with a TaskManager of its
defaults.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_arch  # noqa: F401 - registers the architectures: from here on they load like any other model

DOCUMENTS = [
    {"question": "The if statement is used for conditional", "choices": ["execution.", "bananas."], "answer": 0},
    {"question": "The for statement is used to iterate over the elements of a", "choices": ["cloud.", "sequence."]}
    | {"answer": 1},
]
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
ANSWER = """
task: local_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, ignore_punctuation: true}}]
"""


def evaluate(source: str) -> dict[str, dict]:
    """What lm-eval finds for each task, by its name."""
    model = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(source),
        tokenizer=AutoTokenizer.from_pretrained(source),
        batch_size=2,
    )
    with TemporaryDirectory() as folder:
        data = Path(folder, "documents.jsonl")
        data.write_text("\n".join(json.dumps(document) for document in DOCUMENTS))
        for name, task in (("choice", CHOICE), ("text", ROLLING), ("answer", ANSWER)):
            Path(folder, f"{name}.yaml").write_text(task.format(data=data))
        tasks = TaskManager(include_path=folder, include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=["local_choice", "local_text", "local_answer"],
            task_manager=tasks,
            bootstrap_iters=0,
        )
    return found["results"]


if __name__ == "__main__":
    for task, figures in evaluate(sys.argv[1]).items():
        print(task, {name: value for name, value in figures.items() if isinstance(value, float)})
