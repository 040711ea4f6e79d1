"""A worker process and the conversation with it."""

import json
import os
import select
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


class WorkerFailed(Exception):
    """The subject could not do what was asked."""


class Worker:
    """A process with one subject in it; it is asked one thing at a time."""

    def __init__(self, python: str, threads: int, program: tuple[str, ...] = ("-m", "worker.serve")):
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115, closed in close()
        self.process = subprocess.Popen(
            [python, *program],
            cwd=HERE,  # there, `worker` is a package of its own
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )

    def ask(self, do: str, limit: float, **request) -> dict:
        """The answer; after `limit` seconds without one, or when the process ends, it is over with this worker."""
        self.send(do, **request)
        return self.receive(do, limit)

    def send(self, do: str, **request) -> None:
        if self.process.stdin.closed:
            raise WorkerFailed("took too long before")
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError as error:
            raise WorkerFailed(self.last_words()) from error

    def receive(self, do: str, limit: float) -> dict:
        if not select.select([self.process.stdout], [], [], limit)[0]:
            self.close()
            raise WorkerFailed(f"{do} took more than {limit:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise WorkerFailed(self.last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        return answer

    def last_words(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"ended with code {code}: {lines[-1] if lines else 'it said nothing'}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            pipe.close()
