"""Not in the source distribution: processes that work together, on the CPU."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed
from torch.multiprocessing import spawn


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    torch.set_num_threads(1)


def _start_rank_processes(function: Callable, args: tuple = (), nprocs: int = 2) -> None:
    spawn(function, args, nprocs)


def run_distributed(world_size: int = 2) -> Callable:
    """run_distributed(n)(function)(*args): function(rank, *args) in n processes of one group."""

    def decorate(function: Callable) -> Callable:
        def run(*args, **kwargs) -> None:
            with tempfile.TemporaryDirectory() as folder:
                spawn(one_rank, (function, args, kwargs, world_size, Path(folder) / "rendezvous"), world_size)

        return run

    return decorate


def one_rank(rank: int, function: Callable, args: tuple, kwargs: dict, world_size: int, rendezvous: Path) -> None:
    _set_rank_device(rank)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    distributed.init_process_group("gloo", init_method=rendezvous.as_uri(), rank=rank, world_size=world_size)
    try:
        function(rank, *args, **kwargs)
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
