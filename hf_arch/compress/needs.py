"""Libraries that compression alone needs."""

import importlib.util


def need(*libraries: str) -> None:
    """ImportError, with what to do, where a library is not installed."""
    if missing := [name for name in libraries if importlib.util.find_spec(name) is None]:
        raise ImportError(f'{", ".join(missing)} is not installed: pip install "hf-arch[compress]".')
