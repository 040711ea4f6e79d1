"""Answers requests, one JSON line each: builds a subject, times it, weighs it.

This process has imported what subjects need, and no more. Each is built in a fork of it, which answers until it is told
to leave: none finds the memory of another, and none waits for the imports but the first.
"""

import contextlib
import importlib
import json
import os
import sys
from typing import TextIO

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .machine import Machine
from .memory import in_a_fork, peak_bytes
from .subject import held_bytes


def attention_operations(query, key, value, *args, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


# torch knows those of a GPU; like them it counts all pairs, also those that a causal kernel leaves out
ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_operations}
SLOW_IMPORTS = ("transformers", "hf_arch")  # those that this environment has
SHORT = 256  # tokens of a first call: enough for the buffers that products of any size share


class Server:
    """The subject and what its measures keep between samples."""

    def __init__(self, subject: str, device: str, dtype: str, threads: int, **options):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        module, name = subject.split(":")
        self.device = torch.device(device)
        self.subject = getattr(importlib.import_module(f".{module}", __package__), name)(**options)
        self.subject.model.to(self.device, getattr(torch, dtype))
        self.vocab_size = options["shape"]["vocab_size"]
        self.machine = Machine(self.device, getattr(torch, dtype))
        self.memories: dict[int, object] = {}
        self.short = min(SHORT, options["longest"])
        self.forward(self.short, 1)

    def tokens(self, length: int) -> torch.Tensor:
        return torch.randint(3, self.vocab_size, (1, length), generator=torch.Generator().manual_seed(1)).to(
            self.device
        )

    def about(self) -> dict:
        """What there is to know of the subject."""
        return {"parameters": self.subject.parameters}

    def time(self, measure: str, length: int, calls: int, **options) -> dict:
        """Seconds of one call, the mean over `calls`, and the machine's rates, the mean of before and after."""
        before = self.machine.rates()
        seconds = getattr(self, measure)(length, calls, **options)
        after = self.machine.rates()
        return {"seconds": seconds, "rates": {name: (before[name] + after[name]) / 2 for name in before}}

    def mean_of(self, calls: int, call) -> float:
        start = self.machine.now()
        for _ in range(calls):
            call()
        return (self.machine.now() - start) / calls

    @torch.no_grad()
    def forward(self, length: int, calls: int) -> float:
        self.subject.model.eval()
        ids = self.tokens(length)
        return self.mean_of(calls, lambda: self.subject.logits(ids))

    def training(self, length: int, calls: int) -> float:
        """Forward and backward."""
        self.subject.model.train()
        ids = self.tokens(length)

        def step():
            self.subject.loss(ids).backward()
            self.subject.model.zero_grad()

        return self.mean_of(calls, step)

    @torch.no_grad()
    def step(self, length: int, calls: int, room: int) -> float:
        """One token after `length` of them; goes on where the last sample stopped."""
        self.subject.model.eval()
        if length not in self.memories:
            self.memories[length] = self.subject.begin(self.tokens(length), room)
        token, memory = self.tokens(1), self.memories[length]
        start = self.machine.now()
        for _ in range(calls):
            memory = self.subject.step(token, memory)
        seconds = (self.machine.now() - start) / calls
        self.memories[length] = memory
        return seconds

    @torch.no_grad()
    def generate(self, length: int, calls: int) -> float:
        self.subject.model.eval()
        return self.subject.generate(self.tokens(length), calls)

    def forget(self, length: int) -> dict:
        """Drop what is remembered of a context; how much memory it took."""
        return {"state_bytes": held_bytes(self.memories.pop(length, None))}

    def weigh(self, measure: str, length: int) -> dict:
        """Peak memory of one call; for a forward pass also its operations, counted in a second call."""

        def ask() -> dict:
            getattr(self, measure)(self.short, 1)  # what a first call loads, also in a fork, is no cost of the length
            start = self.machine.now()
            answer = {"peak_bytes": peak_bytes(lambda: getattr(self, measure)(length, 1), self.device)}
            answer["seconds"] = self.machine.now() - start
            if measure == "forward":
                with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
                    self.forward(length, 1)
                answer["operations"] = counter.get_total_flops()
            return answer

        return ask() if self.device.type == "cuda" else in_a_fork(ask)


def answer(server: Server | None, request: dict) -> tuple[Server | None, dict]:
    kind = request.pop("do")
    if kind == "build":
        server = Server(**request)
        return server, server.about()
    return server, getattr(server, kind)(**request)


def serve_one(line: str, replies: TextIO) -> None:
    """From the request to build a subject to the one to leave it."""
    server = None
    while (request := json.loads(line))["do"] != "leave":
        try:
            server, said = answer(server, request)
        except Exception as error:  # a peer may fail in any way; the measurement goes on without it
            said = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(said), file=replies)
        line = sys.stdin.readline()
        if not line:
            return
    print(json.dumps({}), file=replies)


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no reply
    for name in SLOW_IMPORTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if not child:
            serve_one(line, replies)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            print(json.dumps({"error": f"ended with code {code}"}), file=replies)


if __name__ == "__main__":
    main()
