"""The environments that peers need beside ours, made on demand in a folder that can be deleted at any time."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from hf_arch.bench.peers import Environment

FOLDER = Path(".cache/environments")


def python_of(environment: Environment | None, folder: Path = FOLDER) -> str:
    """The interpreter of an environment, which is made first where it is not there as described."""
    if environment is None:
        return sys.executable
    home = folder.resolve() / environment.name
    python, made = home / "bin" / "python", home / "made_from"
    wanted = repr((environment, torch.__version__))
    if not made.exists() or made.read_text() != wanted:
        shutil.rmtree(home, ignore_errors=True)
        make(environment, home, python)
        made.write_text(wanted)
    return str(python)


def make(environment: Environment, home: Path, python: Path) -> None:
    """torch first, and of our version: nothing that follows may bring another."""
    print(f"Making the environment of {environment.name} in {home}", flush=True)
    ours = torch.__version__.split("+")[0]
    commands = [
        [sys.executable, "-m", "venv", str(home)],
        [str(python), "-m", "pip", "install", "--quiet", f"torch=={ours}", "numpy"],
    ]
    if environment.packages:
        commands.append([str(python), "-m", "pip", "install", "--quiet", f"torch=={ours}", *environment.packages])
    if environment.unaided:
        commands.append([str(python), "-m", "pip", "install", "--quiet", "--no-deps", *environment.unaided])
    for command in commands:
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            last = (ran.stderr.strip() or "no reason given").splitlines()[-1]
            raise OSError(f"The environment of {environment.name} cannot be made: {' '.join(command[1:])}: {last}")
