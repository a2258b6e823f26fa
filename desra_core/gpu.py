"""Hold the GPU for one network at a time, have it compute exactly, and recognise its errors."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

# A worker on a GPU has several threads, but memory for the networks of one image at a time.
_GPU = threading.RLock()
# Messages of torch beside its own OutOfMemoryError. Those with "primitive" and "memory" come from oneDNN, on a CPU;
# cuDNN and cuBLAS report a lack of memory as one of the others.
_OUT_OF_MEMORY = (
    "out of memory", "ALLOC_FAILED", "can't allocate memory", "bad_alloc",
    "could not create a primitive", "could not execute a primitive", "could not create a memory",
    "CUDNN_STATUS_NOT_SUPPORTED", "CUDNN_STATUS_INTERNAL_ERROR", "_STATUS_NOT_INITIALIZED",
    "nable to find an engine", "nable to find a valid cuDNN algorithm",
)  # fmt: skip
# Another process on this machine could not use the GPU either, with this torch.
_UNUSABLE = (
    "no kernel image is available", "invalid device ordinal", "busy or unavailable", "no CUDA-capable device",
    "driver version is insufficient",
)  # fmt: skip
_BROKEN = ("CUDA error", "CUDA driver error", "CUDNN_STATUS_EXECUTION_FAILED", "CUBLAS_STATUS_EXECUTION_FAILED")


@contextlib.contextmanager
def exact_on(device: str) -> Iterator[None]:
    """Hold the GPU, if the torch device is one, and have it compute exactly, while other threads of this process wait.

    Float32 then means just that, not TF32, and results can be reproduced. A thread that holds it may ask again. Nothing
    changes on a CPU.
    """
    if not device.startswith("cuda"):
        yield
        return
    with _GPU, _exact():
        yield


def lacks_memory(error: BaseException) -> bool:
    """Check whether an error says that there is not enough memory, of the GPU or of the machine.

    Examples:
        >>> lacks_memory(MemoryError()), lacks_memory(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."))
        (True, True)
        >>> lacks_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
        False
    """
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
    )


def is_unusable(error: BaseException) -> bool:
    """Check whether an error says that no process can compute on this GPU at all.

    Examples:
        >>> is_unusable(RuntimeError("CUDA error: no kernel image is available for execution on the device"))
        True
    """
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _UNUSABLE)


def is_broken(error: BaseException) -> bool:
    """Check whether an error says that this process can no longer use its GPU, while another one may.

    Examples:
        >>> is_broken(RuntimeError("CUDA error: an illegal memory access was encountered"))
        True
        >>> is_broken(RuntimeError("CUDA error: out of memory")) or is_broken(ValueError("CUDA error"))
        False
    """
    named = isinstance(error, RuntimeError) and any(text in str(error) for text in _BROKEN)
    return named and not lacks_memory(error) and not is_unusable(error)


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Set the new switches of cuDNN and cuBLAS alone.

    ``torch.backends.cudnn.flags`` reads the old one for TF32, which torch refuses once a new one has been set.
    """
    from torch.backends import cuda, cudnn

    switches = {"benchmark": False, "deterministic": True}
    before = {name: getattr(cudnn, name) for name in switches}
    precisions = {part: part.fp32_precision for part in (cudnn.conv, cuda.matmul)}  # type: ignore[attr-defined]
    try:
        for name, value in switches.items():
            setattr(cudnn, name, value)
        for part in precisions:
            part.fp32_precision = "ieee"
        yield
    finally:
        for name, value in before.items():
            setattr(cudnn, name, value)
        for part, precision in precisions.items():
            part.fp32_precision = precision
