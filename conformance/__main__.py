"""`python -m conformance [--full] [row ...]`: fetch transformers' tests, run them, write RESULTS.md."""

import argparse
import os
import subprocess
import sys

from .fetch import fetch

OPTIONS = ["--override-ini=addopts=", "--disable-warnings", "--quiet", "--tb=short", "--durations=10", "--record"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m conformance", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="row", help="rows of the catalogue; all by default")
    parser.add_argument("--full", action="store_true", help="also the slow tests")
    parser.add_argument("--workers", default="auto", help="how many processes")
    given = parser.parse_args()
    rows = [f"--row={name}" for name in given.rows]
    fetch()
    # a class per worker: the tests of one share what they import and compile
    workers = [f"--numprocesses={given.workers}", "--dist=loadscope"]
    command = [sys.executable, "-m", "pytest", "conformance/test_common.py", *OPTIONS, *workers, *rows]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run([*command, "--full"] if given.full else command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
