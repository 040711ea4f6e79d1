"""The command `hf-arch`: what it prints, what it passes on, and how it fails."""

import importlib
import subprocess
import sys

import pytest

from hf_arch import ARCHITECTURES, cli
from promises import Case


def test_list_shows_every_row(capsys):
    assert cli.main(["list"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "family", "paper", "heads"]
    assert [line.split() for line in lines] == [[row.name, row.family, row.paper, *row.heads] for row in ARCHITECTURES]


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["export", "one"], ["convert", "source", "--output", "x"]])
def test_a_command_that_is_wrong_is_explained(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: hf-arch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("demo --architecture retnett", "Did you mean retnet"),
        ("demo --text {folder}/absent.txt", "There is no file {folder}/absent.txt"),
        ("convert {folder}/absent --architecture retnett --output {folder}/o", "Did you mean retnet"),
        ("convert {folder}/absent --architecture retnet --output {folder}/o", "{folder}/absent"),
        ("export {folder} {folder}/o", "{folder} holds no model"),
    ],
)
def test_a_mistake_is_one_line_without_a_traceback(arguments, message, tmp_path, capsys):
    assert cli.main(arguments.format(folder=tmp_path).split()) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("hf-arch: ")
    assert message.format(folder=tmp_path) in said.err
    assert "Traceback" not in said.err


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "ARCHITECTURES", [None])
    with pytest.raises(AttributeError):
        cli.main(["list"])


def test_demo_passes_on_what_it_is_told(monkeypatch):
    called = []
    monkeypatch.setattr(importlib.import_module("hf_arch.demo.run"), "run", lambda *arguments: called.append(arguments))
    assert cli.main(["demo"]) == 0
    assert (
        cli.main(["demo", "--architecture", "transformer", "--text", "a", "b", "--output", "o", "--push", "ann/x"]) == 0
    )
    assert called == [("retnet", [], "hf_arch_demo", None), ("transformer", ["a", "b"], "o", "ann/x")]


def test_demo_names_the_extra_that_is_missing(monkeypatch, capsys):
    def without_rich(name):
        raise ModuleNotFoundError(name="rich")

    monkeypatch.setattr(importlib, "import_module", without_rich)
    assert cli.main(["demo"]) == 2
    assert "The demo needs rich: pip install 'hf-arch[demo]'." in capsys.readouterr().err


def test_convert_passes_on_what_it_is_told(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(cli, "convert", lambda *arguments, **options: called.append((arguments, options)))
    assert cli.main(["convert", "source", "--architecture", "retnet", "--output", "o", "--verify"]) == 0
    assert called == [(("source", "retnet"), {"output": "o", "verify": True})]
    assert "Converted to o" in capsys.readouterr().out


def test_export_writes_and_pushes(monkeypatch, tmp_path, capsys):
    saved, exported, pushed = tmp_path / "saved", tmp_path / "exported", []
    Case(ARCHITECTURES[0], "ForCausalLM").build().save_pretrained(saved)
    monkeypatch.setattr(cli, "push_to_hub", lambda *arguments: pushed.append(arguments) or "hf.co/ann/x")
    assert cli.main(["export", str(saved), str(exported), "--push", "ann/x"]) == 0
    assert (exported / f"modeling_{ARCHITECTURES[0].name}.py").exists()
    assert pushed == [(str(exported), "ann/x")]
    assert capsys.readouterr().out == f"Exported to {exported}\nPushed to hf.co/ann/x\n"


def test_an_interruption_is_no_traceback(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "show_catalogue", interrupted)
    assert cli.main(["list"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_the_package_runs_as_a_module():
    ran = subprocess.run([sys.executable, "-m", "hf_arch", "list"], capture_output=True, text=True, check=True)
    assert "retnet" in ran.stdout
