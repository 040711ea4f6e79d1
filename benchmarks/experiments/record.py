"""What was found, kept as a file of JSON: the old one stays whole until the new one is."""

import json
import os
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "experiments"


def load(name: str, folder: Path = RESULTS) -> Any:
    """What was kept, None where nothing was."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def write(name: str, text: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}.part"
    part.write_text(text + "\n")
    os.replace(part, folder / f"{name}.json")
