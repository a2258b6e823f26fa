"""Hold the GPU for one network at a time, have it compute exactly, and recognise its errors."""

import contextlib
import threading
from collections.abc import Iterator

# A worker on a GPU has several threads, but the GPU has memory for one image at a time.
_GPU = threading.RLock()
# Parts of torch's messages about a lack of memory: those with "could not" come from oneDNN on a CPU, those
# with "STATUS" or "engine" from cuDNN and cuBLAS.
_OUT_OF_MEMORY = (
    "out of memory", "ALLOC_FAILED", "can't allocate memory", "bad_alloc",
    "could not create a primitive", "could not execute a primitive", "could not create a memory",
    "CUDNN_STATUS_NOT_SUPPORTED", "CUDNN_STATUS_INTERNAL_ERROR", "_STATUS_NOT_INITIALIZED",
    "nable to find an engine", "nable to find a valid cuDNN algorithm",
)  # fmt: skip
# Parts of messages that mean: with this torch, no process on this machine can use the GPU.
_UNUSABLE = (
    "no kernel image is available", "invalid device ordinal", "busy or unavailable", "no CUDA-capable device",
    "driver version is insufficient",
)  # fmt: skip
_BROKEN = ("CUDA error", "CUDA driver error", "CUDNN_STATUS_EXECUTION_FAILED", "CUBLAS_STATUS_EXECUTION_FAILED")


@contextlib.contextmanager
def exact_on(device: str) -> Iterator[None]:
    """Hold the GPU, if the torch device is a GPU, and have it compute exactly; other threads of this process wait.

    Float32 is then not rounded to TF32, and results can be reproduced. A thread that holds the GPU may call this again.
    Nothing changes on a CPU.
    """
    if not device.startswith("cuda"):
        yield
        return
    from torch.backends import cuda, cudnn

    # torch.backends.cudnn.flags reads the old switch for TF32, which torch refuses once the new switch was set.
    switches = (
        (cudnn, "benchmark", False), (cudnn, "deterministic", True),
        (cudnn.conv, "fp32_precision", "ieee"), (cuda.matmul, "fp32_precision", "ieee"),  # type: ignore[attr-defined]
    )  # fmt: skip
    with _GPU:
        before = [(place, name, getattr(place, name)) for place, name, _ in switches]
        try:
            for switch in switches:
                setattr(*switch)
            yield
        finally:
            for switch in before:
                setattr(*switch)


def lacks_memory(error: BaseException) -> bool:
    """Check whether an error means that the GPU or the machine has not enough memory."""
    return isinstance(error, MemoryError) or _has(error, _OUT_OF_MEMORY)


def is_unusable(error: BaseException) -> bool:
    """Check whether an error means that no process can compute on this GPU, as when torch has no kernels for it."""
    return _has(error, _UNUSABLE)


def is_broken(error: BaseException) -> bool:
    """Check whether an error means that this process can no longer use its GPU, while another process may."""
    return _has(error, _BROKEN) and not lacks_memory(error) and not is_unusable(error)


def _has(error: BaseException, texts: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
