"""A new model in parts, one to a process, which Trainer takes as it is."""

from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig


def check_sharding(tensor_parallel: int, state: PartialState) -> None:
    """Raises ValueError for what the processes cannot do."""
    if tensor_parallel > 1 and state.device.type == "cpu":
        raise ValueError(
            "Trainer splits matrices on GPUs alone: accelerate knows no mesh of CPUs. Weights can be sharded."
        )
    if state.num_processes % tensor_parallel:
        raise ValueError(f"{state.num_processes} processes cannot split each matrix among {tensor_parallel}.")


def sharded(
    model: PreTrainedModel, folder: str | Path, state: PartialState, tensor_parallel: int = 1
) -> PreTrainedModel:
    """The model with each matrix split among `tensor_parallel` processes, by the plan of its config, and the weights
    among the groups of such (FSDP2). Every process calls it; the model goes by way of a `folder` that all see.

    Trainer saves it whole, but of the optimizer only what the first process has: such a run cannot resume. `accelerate
    launch --use_fsdp --fsdp_version 2`, for which a model is not sharded here, can, on GPUs.
    """
    if state.is_main_process:
        model.save_pretrained(folder)
    state.wait_for_everyone()
    told = DistributedConfig(tp_size=tensor_parallel, fsdp_size=state.num_processes // tensor_parallel)
    return type(model).from_pretrained(folder, distributed_config=told)
