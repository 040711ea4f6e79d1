"""transformers' tests/ folder, of the version that is installed, in a folder that git ignores."""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

VERSION = version("transformers")
TESTS = Path(__file__).parents[1] / ".cache" / f"conformance-{VERSION}" / "tests"


def fetch() -> Path:
    """The folder; the first call downloads 10 MB from the package index."""
    if not (TESTS / "__init__.py").exists():
        with tempfile.TemporaryDirectory() as folder:
            unpack(download(Path(folder)))
    return TESTS


def download(folder: Path) -> Path:
    wanted = f"transformers=={VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", folder]
    run = subprocess.run([*command, "--no-deps", "--no-binary", "transformers", wanted])
    archives = list(folder.glob("transformers-*.tar.gz"))
    if run.returncode or not archives:
        sys.exit(
            f"The source distribution of {wanted} could not be downloaded (pip said why, above). The common tests are "
            "in it and nowhere else: run this where the package index can be reached."
        )
    return archives[0]


def unpack(archive: Path) -> None:
    """Only tests/, all of it or nothing: `__init__.py`, which the archive lacks and its tests look for, comes last."""
    shutil.rmtree(TESTS.parent, ignore_errors=True)
    with tarfile.open(archive) as files:
        members = [member for member in files if member.name.split("/")[1:2] == ["tests"] and member.isfile()]
        for member in members:
            member.name = member.name.split("/", 1)[1]
        files.extractall(TESTS.parent, members, filter="data")
    (TESTS / "__init__.py").touch()
