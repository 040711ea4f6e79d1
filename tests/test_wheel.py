"""The wheel is the whole package, and the sdist is enough to build it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from hf_arch import find

REPOSITORY = Path(__file__).parent.parent

USE = """
import importlib, pkgutil, sys
import hf_arch
from hf_arch.export import export

assert hf_arch.__file__.startswith(sys.argv[1]), hf_arch.__file__
for module in pkgutil.walk_packages(hf_arch.__path__, "hf_arch."):
    if module.name != "hf_arch.__main__":  # it runs when imported
        assert importlib.import_module(module.name).__file__.startswith(sys.argv[1]), module
for row in hf_arch.ARCHITECTURES:
    for head in row.heads:
        model = row.load(head)(row.tiny_config(head))
        if (row.name, head) == ("retnet", "ForCausalLM"):
            export(model, "exported")
"""


def run(*command, **options):
    subprocess.run([sys.executable, *map(str, command)], check=True, **options)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """The wheel as built from the sources, and as built from the sdist."""
    folder = tmp_path_factory.mktemp("built")
    sources = folder / "sources"  # a copy: setuptools leaves its work beside what it builds
    sources.mkdir()
    for path in REPOSITORY.iterdir():
        if path.name in ("hf_arch", "modeling"):
            shutil.copytree(path, sources / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file():
            shutil.copy(path, sources)
    run("-m", "build", "--no-isolation", "--wheel", "--outdir", folder / "direct", sources)
    run("-m", "build", "--no-isolation", "--outdir", folder / "through_sdist", sources)
    return [next((folder / way).glob("*.whl")) for way in ("direct", "through_sdist")]


def contents(wheel):
    return {file.filename: file.CRC for file in zipfile.ZipFile(wheel).infolist()}


def test_the_sdist_builds_the_same_wheel(wheels):
    assert contents(wheels[0]) == contents(wheels[1])


def test_the_wheel_holds_the_package_its_licence_and_its_types(wheels):
    names = contents(wheels[0]).keys()
    assert "hf_arch/py.typed" in names and any(name.endswith("dist-info/licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"hf_arch"}


def test_an_installed_wheel_works(wheels, tmp_path):
    installed = tmp_path / "installed"
    run("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", installed, wheels[0])
    # -S: no .pth file is read, so that the editable install of this checkout is not there
    path = os.pathsep.join((str(installed), sysconfig.get_path("purelib")))
    run("-S", "-c", USE, installed, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path})
    find("retnet").load("ForCausalLM").from_pretrained(tmp_path / "exported")
