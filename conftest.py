"""What every run of pytest here has: one thread a process, and no time lost on what is not tested."""

import gc

import torch


def pytest_configure():
    torch.set_num_threads(1)  # there is one process per core
    for device in (torch.cuda, torch.xpu, torch.mtia):
        if not device.is_available():  # a seed for one that may come is kept with a stack trace: milliseconds each
            device.manual_seed_all = lambda seed: None


def pytest_collection_finish():
    """A collection of garbage looks at all imported libraries each time, and a Trainer asks for many."""
    gc.collect()
    gc.freeze()
