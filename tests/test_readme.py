"""The README says what is so: its table is the catalogue's, and its example runs."""

import re
from pathlib import Path

from hf_arch.listing import markdown

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_table_is_rendered_from_the_catalogue():
    shown = re.search(r"<!-- catalogue -->\n(.*)\n<!-- /catalogue -->", README, re.DOTALL)[1]
    assert shown == markdown(), "paste the output of: hf-arch list --markdown"


def test_the_examples_run_one_after_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for example in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(example, "README.md", "exec"), names)
    assert (tmp_path / "my-retnet" / "model.safetensors").exists()
    assert (tmp_path / "book.state").exists()
