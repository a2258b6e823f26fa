"""The meaning of a GPU's errors, and the switches for exact results, which exist without a GPU too."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch.backends import cuda, cudnn
from torch.nn.functional import conv2d

from desra_core.gpu import exact_on, is_broken, is_unusable, lacks_memory

LACKS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed ..."),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
]
BROKEN = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ..."),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA driver error: device not ready"),
]
UNUSABLE = [
    torch.AcceleratorError("CUDA error: all CUDA-capable devices are busy or unavailable"),
    torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
    torch.AcceleratorError("CUDA error: invalid device ordinal\nCUDA kernel errors might be ..."),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("CUDA error: no CUDA-capable device is detected"),
    RuntimeError("CUDA driver version is insufficient for CUDA runtime version"),
]
NEITHER = [
    RuntimeError("Kernel size can't be greater than actual input size"),
    ValueError("CUDA error: out of memory"),
    RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
]


@pytest.mark.parametrize("error", [*LACKS, *BROKEN, *UNUSABLE, *NEITHER], ids=lambda error: str(error)[:40])
def test_the_meaning_of_an_error(error: Exception) -> None:
    assert lacks_memory(error) == (error in LACKS)
    assert is_broken(error) == (error in BROKEN)
    assert is_unusable(error) == (error in UNUSABLE)


def switches() -> list[object]:
    return [cudnn.conv.fp32_precision, cuda.matmul.fp32_precision, cudnn.benchmark, cudnn.deterministic, cudnn.enabled]


@pytest.fixture(params=["untouched", "conv", "cudnn", "all", "matmul", "old"])
def touched(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process in which one of torch's switches for TF32 was set, new or old."""
    places = {"conv": cudnn.conv, "cudnn": cudnn, "all": torch.backends, "matmul": cuda.matmul}
    before = [(place, place.fp32_precision) for place in (torch.backends, cudnn, cuda.matmul, cudnn.conv, cudnn.rnn)]
    if request.param in places:
        places[request.param].fp32_precision = "ieee" if request.param == "conv" else "tf32"
    if request.param == "old":
        cudnn.allow_tf32 = False
    yield
    if request.param == "old":
        cudnn.allow_tf32 = True
    for place, precision in before:
        place.fp32_precision = precision
    assert cudnn.allow_tf32 is True  # torch raises an error here where new and old switches disagree


@pytest.mark.usefixtures("touched")
def test_a_gpu_computes_exactly_whatever_was_set() -> None:
    before = switches()
    for _ in range(2):
        with exact_on("cuda:0"):
            assert switches() == ["ieee", "ieee", False, True, True]
            with exact_on("cuda:0"):
                conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3))
            assert switches() == ["ieee", "ieee", False, True, True]
        assert switches() == before
    with pytest.raises(KeyError), exact_on("cuda:0"):
        raise KeyError
    assert switches() == before
    with exact_on("cpu"):
        assert switches() == before


def test_a_gpu_is_held_by_one_thread() -> None:
    inside, entered = threading.Event(), threading.Event()

    def enter() -> None:
        inside.set()
        with exact_on("cuda"):
            entered.set()

    with exact_on("cuda"), exact_on("cuda"):
        other = threading.Thread(target=enter)
        other.start()
        assert inside.wait(10)
        assert not entered.wait(0.05)
    other.join()
    assert entered.is_set()
