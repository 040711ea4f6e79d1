"""How fast the machine is just now: the rates that a floor is made of."""

import time
from collections.abc import Callable

import torch

PROBE_SECONDS = 0.006  # of each rate: short beside what it stands next to


def now(device: torch.device) -> float:
    """Seconds by a clock. One thread is timed by its processor's: what else the machine does lengthens it least."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


class Machine:
    """Probes on tensors of the model's dtype. Sizes: products that fill the processor, matrices that together are as
    large as a small model, exponentials that stay in the cache."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, size = device, 512 if device.type == "cpu" else 4096
        made = {"device": device, "dtype": dtype}
        self.left, self.right, self.product = (torch.ones(size, size, **made) for _ in range(3))
        self.layers = [torch.ones(2 * size, 2 * size, **made) for _ in range(4)]
        self.vector = torch.ones(2 * size, **made)
        self.numbers, self.powers = (torch.ones(2**18 if device.type == "cpu" else 2**26, **made) for _ in range(2))
        self.rates()  # the first calls are slow

    def now(self) -> float:
        return now(self.device)

    @torch.no_grad()
    def rates(self) -> dict[str, float]:
        """Multiply-adds as two operations, bytes of weights in matrix-vector products, exponentials, per second."""
        return {
            "matmul": self.per_second(2 * len(self.left) ** 3, self.multiply),
            "bandwidth": self.per_second(sum(layer.nbytes for layer in self.layers), self.apply),
            "exponential": self.per_second(self.numbers.numel(), self.exponentiate),
        }

    def multiply(self) -> None:
        torch.mm(self.left, self.right, out=self.product)

    def apply(self) -> None:
        for layer in self.layers:
            torch.mv(layer, self.vector)

    def exponentiate(self) -> None:
        torch.exp(self.numbers, out=self.powers)

    def per_second(self, amount: float, call: Callable) -> float:
        count, start = 0, self.now()
        while (passed := self.now() - start) < PROBE_SECONDS:
            call()
            count += 1
        return amount * count / passed
