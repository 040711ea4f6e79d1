"""A worker process and the conversation with it."""

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


class WorkerFailed(Exception):
    """The subject could not do what was asked."""


class Worker:
    """A process with one subject in it; it is asked one thing at a time."""

    def __init__(self, python: str, threads: int, program: tuple[str, ...] = ("-m", "worker.serve")):
        self.python = python
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115, closed in close()
        self.process = subprocess.Popen(
            [python, *program],
            cwd=HERE,  # there, `worker` is a package of its own
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            start_new_session=True,
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
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.errors):
            pipe.close()


class Workers:
    """Those of one run. Who has done its work is kept for the next subject of the same environment."""

    def __init__(self, threads: int):
        self.threads, self.idle = threads, []

    def hire(self, python: str) -> Worker:
        for worker in self.idle:
            if worker.python == python:
                self.idle.remove(worker)
                return worker
        return Worker(python, self.threads)

    def dismiss(self, worker: Worker) -> None:
        try:
            worker.ask("leave", limit=10)
        except WorkerFailed:
            worker.close()
        else:
            self.idle.append(worker)

    def close(self) -> None:
        while self.idle:
            self.idle.pop().close()
