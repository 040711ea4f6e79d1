"""`hf-arch list | describe | demo | convert | export | serve | bench | evaluate`."""

import argparse
import importlib
import sys

from hf_arch import ARCHITECTURES
from hf_arch.convert import convert
from hf_arch.export import export, push_to_hub
from hf_arch.listing import markdown


def main(arguments: list[str] | None = None) -> int:
    """Run one command; what the user can put right is said in one line, with exit code 2."""
    options = parser().parse_args(arguments)
    try:
        options.command(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"hf-arch: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hf-arch: interrupted; what was saved before is whole.", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("hf-arch", description="Model architectures for the Hugging Face Hub.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("list", help="show every architecture")
    command.set_defaults(command=show_catalogue)
    command.add_argument("--markdown", action="store_true", help="as the README's table")

    command = commands.add_parser("describe", help="parameters, cache and operations for a token, beside known models")
    command.set_defaults(command=describe)
    command.add_argument("models", nargs="*", metavar="MODEL", help="folders or repositories with a config of hf_arch")
    command.add_argument("--context", type=int, default=8192, metavar="TOKENS", help="default: %(default)s")

    command = commands.add_parser("demo", help="train, fine-tune, save, load and merge a small model, in minutes")
    command.set_defaults(command=demo)
    command.add_argument("--architecture", default="retnet", metavar="NAME", help="default: %(default)s")
    command.add_argument("--text", nargs="+", default=[], metavar="FILE", help="learn this; default: Python's manual")
    command.add_argument("--output", default="hf_arch_demo", metavar="FOLDER", help="default: %(default)s")
    command.add_argument("--push", metavar="USER/REPO", help="push the merged model to the Hub")

    command = commands.add_parser("convert", help="make a checkpoint of the original library one of ours")
    command.set_defaults(command=convert_checkpoint)
    command.add_argument("source", metavar="SOURCE", help="a folder, or a repository of the Hub")
    command.add_argument("--architecture", required=True, metavar="NAME", help="one that `hf-arch list` shows")
    command.add_argument("--output", required=True, metavar="FOLDER")
    command.add_argument("--verify", action="store_true", help="compare its answers with the original library's")

    command = commands.add_parser("export", help="make a saved model load where hf_arch is not installed")
    command.set_defaults(command=export_checkpoint)
    command.add_argument("model", metavar="MODEL", help="a folder that save_pretrained wrote")
    command.add_argument("folder", metavar="FOLDER", help="where to write the model with its code and card")
    command.add_argument("--push", metavar="USER/REPO", help="push it to the Hub as well")

    # No prefix marks an option here: all of them, --help too, are those of `transformers serve`
    command = commands.add_parser("serve", add_help=False, prefix_chars="\0", help="an OpenAI server of a saved model")
    command.set_defaults(command=serve)
    command.add_argument("arguments", nargs="*")

    add_bench(commands)
    add_evaluate(commands)
    return top


def add_bench(commands) -> None:
    command = commands.add_parser("bench", help="measure speed, memory and state, beside who else does the same")
    command.set_defaults(command=bench)
    command.add_argument("rows", nargs="*", metavar="ROW", help="architectures that `hf-arch list` shows; default: all")
    command.add_argument("--peers", nargs="*", metavar="NAME", help="measure these other libraries too; no NAME: all")
    command.add_argument("--lengths", nargs="+", type=int, default=[], metavar="TOKENS", help="of texts and contexts")
    command.add_argument("--quick", action="store_true", help="short texts, few rounds: about 15 seconds a row")
    command.add_argument(
        "--device", default="cpu", help="cpu, or cuda with sizes that fill a GPU; default: %(default)s"
    )
    command.add_argument("--dtype", default="float32", help="default: %(default)s")
    command.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    command.add_argument("--output", default="hf_arch_bench", metavar="FOLDER", help="default: %(default)s")
    command.add_argument(
        "--render", metavar="README", help="measure nothing: put the table of what FOLDER holds between README's marks"
    )


def add_evaluate(commands) -> None:
    command = commands.add_parser("evaluate", help="bits per byte over the context, and a pass key in a long text")
    command.set_defaults(command=evaluate)
    command.add_argument("model", metavar="MODEL", help="a causal language model: a folder, or a repository of the Hub")
    command.add_argument("--text", nargs="+", required=True, metavar="FILE", help="to measure on, read as one text")
    command.add_argument("--lengths", nargs="+", type=int, default=[], metavar="TOKENS")
    command.add_argument("--windows", type=int, default=8, help="of the text; default: %(default)s")
    command.add_argument("--trials", type=int, default=5, help="pass keys at each depth; default: %(default)s")
    command.add_argument("--tokenizer", metavar="SOURCE", help="default: the one that MODEL holds")
    command.add_argument("--device", default="cpu", help="default: %(default)s")
    command.add_argument("--dtype", default="float32", help="default: %(default)s")
    command.add_argument("--trust-remote-code", action="store_true", help="run the code that MODEL brings")
    command.add_argument("--output", default="hf_arch_evaluation", metavar="FOLDER", help="default: %(default)s")


def show_catalogue(options: argparse.Namespace) -> None:
    if options.markdown:
        print(markdown())
        return
    lines = [("name", "family", "paper", "heads")]
    lines += [(row.name, row.family, row.paper, " ".join(row.heads)) for row in ARCHITECTURES]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def describe(options: argparse.Namespace) -> None:
    described = importlib.import_module("hf_arch.description")  # not at the top: it imports every architecture
    print(described.beside_released(options.models, options.context))


def demo(options: argparse.Namespace) -> None:
    try:
        job = importlib.import_module("hf_arch.demo.run")  # not at the top: the other commands do without its extras
    except ModuleNotFoundError as error:
        raise ImportError(f"The demo needs {error.name}: pip install 'hf-arch[demo]'.") from error
    job.run(options.architecture, options.text, options.output, options.push)


def convert_checkpoint(options: argparse.Namespace) -> None:
    convert(options.source, options.architecture, output=options.output, verify=options.verify)
    print(f"Converted to {options.output}")


def export_checkpoint(options: argparse.Namespace) -> None:
    print(f"Exported to {export(options.model, options.folder)}")
    if options.push is not None:
        print(f"Pushed to {push_to_hub(options.folder, options.push)}")


def serve(options: argparse.Namespace) -> None:
    importlib.import_module("hf_arch.serve").run(options.arguments)  # not at the top: it takes seconds to import


def bench(options: argparse.Namespace) -> None:
    try:
        job = importlib.import_module("hf_arch.bench.run")  # not at the top: the other commands do without its extras
    except ModuleNotFoundError as error:
        raise ImportError(f"The benchmark needs {error.name}: pip install 'hf-arch[plots]'.") from error
    if options.render is not None:
        job.render(options.output, options.render)
        return
    sizes = options.lengths, options.quick, options.device, options.dtype, options.threads
    job.run(options.rows, options.peers, options.output, job.settings_for(*sizes))


def evaluate(options: argparse.Namespace) -> None:
    try:
        job = importlib.import_module("hf_arch.evaluate.run")  # as above
    except ModuleNotFoundError as error:
        raise ImportError(f"The evaluation needs {error.name}: pip install 'hf-arch[plots]'.") from error
    names = ("lengths", "windows", "trials", "device", "dtype", "trust_remote_code")
    settings = job.Settings(**{name: getattr(options, name) for name in names})
    job.run(options.model, options.text, options.output, settings, options.tokenizer)
    print(f"Everything is in {options.output}")
