"""One rule decides which implementation of an op runs: the torch source, a named kernel on a GPU, or machine code that
torch.compile makes on a CPU."""

import functools
import importlib
import os
import warnings
from collections.abc import Callable

import torch

from .documents import find_documents


def accelerated(kernel: str, adapt: Callable | None = None, packs: bool = True) -> Callable[[Callable], Callable]:
    """Hand a call to `kernel` ("package.module:function") when its tensors are on a GPU and the package is there.

    The decorated torch function is the definition: tensors [batch, length, ...] positional, options keyword-only and
    named as in the kernel, the same answer (output, final_state) on any device. `documents`, which kernels do not know,
    become a packed row and its `cu_seqlens`, where the kernel `packs`. `adapt(kernel, ...)` calls a kernel that wants
    its arguments in another form; it answers NotImplemented to what the kernel cannot do, which the torch function then
    does. `HF_ARCH_KERNELS=0` turns every kernel off.
    """

    @functools.cache
    def find() -> Callable | None:
        module, name = kernel.split(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except ImportError:
            return None
        return found if adapt is None else functools.partial(adapt, found)

    def decorate(torch_op: Callable) -> Callable:
        @functools.wraps(torch_op)
        def call(query: torch.Tensor, *args, documents=None, **options):
            wanted = query.is_cuda and query.dtype != torch.float64 and os.environ.get("HF_ARCH_KERNELS", "1") != "0"
            found, answer = find() if wanted else None, NotImplemented
            if found is not None:
                run = functools.partial(on_packed_rows, found) if packs else found
                answer = run(query, *args, documents=documents, **options)
            if answer is NotImplemented:
                answer = torch_op(query, *args, documents=documents, **options)
            return answer

        return call

    return decorate


def on_packed_rows(kernel: Callable, *tensors, documents=None, initial_state=None, output_final_state=False, **options):
    """Call a kernel that knows documents by `cu_seqlens`: all real tokens in one row, a state per document."""
    options["output_final_state"] = output_final_state
    if documents is None:
        return kernel(*tensors, initial_state=initial_state, **options)
    found, (batch, length) = find_documents(documents), documents.shape
    rows = (tensor.flatten(0, 1)[found.token][None] for tensor in tensors)
    if initial_state is not None:  # it belongs to the first document of a row
        before = initial_state[found.batch_row] * found.first.view(-1, *(1,) * (initial_state.ndim - 1))
    output, states = kernel(
        *rows, initial_state=None if initial_state is None else before, cu_seqlens=found.cu_seqlens, **options
    )
    packed = output.new_zeros(batch * length, *output.shape[2:]).index_put((found.token,), output[0])
    if output_final_state:
        after = states.new_zeros(batch, *states.shape[1:]) if initial_state is None else initial_state.to(states.dtype)
        states = after.index_put((found.batch_row[found.last],), states[found.last])
    return packed.unflatten(0, (batch, length)), states


def compiled(function: Callable, like: torch.Tensor) -> Callable | None:
    """The machine code of `function` for tensors on a CPU where `HF_ARCH_COMPILE=1` asks for it, else None. Compiling
    takes about a minute once; torch keeps the result on disk (`TORCHINDUCTOR_CACHE_DIR`). Where it cannot, as without a
    C++ compiler, a warning says so."""
    wanted = os.environ.get("HF_ARCH_COMPILE", "0") != "0" and like.device.type == "cpu"
    return machine_code(function) if wanted and not torch.compiler.is_compiling() and can_compile() else None


@functools.cache
def machine_code(function: Callable) -> Callable:
    return torch.compile(function)


@functools.cache
def can_compile() -> bool:
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2))
    except Exception as error:  # whatever is missing: the uncompiled form gives the same answer
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"HF_ARCH_COMPILE: nothing can be compiled here, ops run as they are: {reason}", stacklevel=3)
        return False
    return True
