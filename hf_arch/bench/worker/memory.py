"""How much memory a call takes at its peak, beyond the model: measured in a fork of the process that loaded it.

On a CPU it is the high-water mark of the resident set over where the call began. The fork has made a short call first:
it starts without the pages of libraries, and loads them anew.
On a GPU it is what torch's allocator counts.
"""

import contextlib
import ctypes
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

STATM = Path("/proc/self/statm")


def resident() -> int:
    """Bytes in memory now; where the system does not tell, the most that there were."""
    if STATM.exists():
        return int(STATM.read_text().split()[1]) * resource.getpagesize()
    return high_water_mark()


def high_water_mark() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    start_from_here()
    before = resident()
    call()
    return max(0, high_water_mark() - before)


def start_from_here() -> None:
    """Give back freed pages, which would be reused unseen, and forget the high-water mark; where the system can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def in_a_fork(ask: Callable[[], dict]) -> dict:
    """The answer of a fork of this process, which leaves no trace here."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write, json.dumps(ask()).encode())
        except BaseException as error:  # whatever it is, the parent says it
            os.write(write, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    answer = json.loads(said) if said else {"error": "ended without an answer: out of memory?"}
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer
