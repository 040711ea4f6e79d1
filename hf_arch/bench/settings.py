"""What is measured, how often and at which sizes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

MEASURES = ("forward", "training", "step", "generate")
SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "vocab_size": 1000,
}
LARGE = {
    "hidden_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "intermediate_size": 5632,
    "vocab_size": 32000,
}
# Lengths of the text for a pass, of the context for a step
FULL = {
    "forward": (1024, 2048, 4096, 8192),
    "training": (1024, 2048, 4096),
    "step": (1024, 4096, 16384, 65536),
    "generate": (1024, 4096),
}
QUICK = {"forward": (512, 1024), "training": (512,), "step": (512,), "generate": (512,)}
ON_GPU = {
    "forward": (2048, 4096, 8192, 16384, 32768),
    "training": (2048, 4096, 8192, 16384),
    "step": (1024, 4096, 16384, 65536),
    "generate": (1024, 4096),
}
# Fields of a row's config, where its default is not what is to be measured: predictors that have learnt nothing choose
# half of the tokens; groups of which texts of these lengths hold a whole number, as the peer of Hourglass asks
MEASURED_AS = {
    "mixture_of_depths": lambda shape: {
        "capacity": 0.5,
        "layer_types": ["routed_attention"] * shape["num_hidden_layers"],
    },
    "hourglass": lambda shape: {"shorten_factors": [4]},
    # Without training, chunks begin at every other token
    "hnet": lambda shape: {"inner_hidden_sizes": [shape["hidden_size"]], "target_ratios": [2.0]},
    "hat_encoder_decoder": lambda shape: {"encoder_num_hidden_layers": shape["num_hidden_layers"]},
}
# Encoder-decoders of which reading and answering are measured; of others, it is the encoder
ANSWERING = ("hat_encoder_decoder",)
UNBOUNDED_CONTEXT = 16384  # the longest context for rows whose state grows with it: reading it is quadratic


@dataclass(frozen=True)
class Settings:
    shape: dict = field(default_factory=lambda: SMALL)
    lengths: dict[str, Sequence[int]] = field(default_factory=lambda: FULL)
    rounds: int = 7
    steps: int = 32  # tokens of one sample of decoding
    sample_seconds: float = 0.3  # a sample repeats shorter calls for so long
    limit: float = 60.0  # a call that would take more is left out
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1

    @property
    def longest(self) -> int:
        return max(max(lengths, default=1) for lengths in self.lengths.values()) + self.room

    @property
    def room(self) -> int:
        """Tokens that are decoded in all after a context."""
        return (self.rounds + 1) * self.steps

    @property
    def number_bytes(self) -> int:
        return getattr(torch, self.dtype).itemsize

    def as_dict(self) -> dict:
        return asdict(self)


def settings_for(
    lengths: Sequence[int] = (), quick: bool = False, device: str = "cpu", dtype: str = "float32", threads: int = 1
) -> Settings:
    """The settings of the command; `lengths` are for all measures, instead of each one's own."""
    if not hasattr(torch, dtype) or not getattr(getattr(torch, dtype), "is_floating_point", False):
        raise ValueError(f"--dtype {dtype} is no floating-point type of torch: try float32 or bfloat16.")
    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this machine has no GPU that torch can use.")
    if any(length < 32 for length in lengths):
        raise ValueError("--lengths are in tokens, 32 or more.")
    own = QUICK if quick else FULL if device == "cpu" else ON_GPU
    few = {"rounds": 3, "steps": 4, "sample_seconds": 0.05, "limit": 5.0} if quick else {}
    return Settings(
        shape=SMALL if device == "cpu" else LARGE,
        lengths=dict.fromkeys(MEASURES, tuple(sorted(set(lengths)))) if lengths else own,
        device=device,
        dtype=dtype,
        threads=threads,
        **few,
    )
