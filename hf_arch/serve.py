"""`hf-arch serve`: transformers' own server, in a process where it finds our classes.

`transformers serve` takes the class that a config names from the transformers module, where ours are not.
"""

from transformers.cli.transformers import app
from transformers.utils.import_utils import is_serve_available

from hf_arch.registration import expose


def run(arguments: list[str]) -> None:
    """Serve until interrupted. arguments: those of `transformers serve`, a model, if there is but one, and options.

    Raises ImportError without the extra `serve`, and SystemExit as every command of transformers does.
    """
    if not is_serve_available():
        raise ImportError("Serving needs fastapi, uvicorn and openai: pip install 'hf-arch[serve]'.")
    expose()
    app(["serve", *arguments], prog_name="hf-arch")
