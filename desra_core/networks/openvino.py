"""OpenVINO's CPU kernels: in the place of PyTorch's for parts of a network, and for networks in ONNX files.

Needs the extra ``openvino``.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from desra_core.errors import UsageError, described
from desra_core.files import read_input
from desra_core.third_party import require


class Compiled(nn.Module):
    """A part of a network, compiled for batches of any size.

    Args:
        part: It maps one float32 tensor ``(N, C, h, w)`` to another, in the same way whatever ``h`` and ``w`` are. C is
            the number of input channels of its first convolution.
        bfloat16: Compute in bfloat16 where OpenVINO can; input and output are float32 anyway.

    Raises:
        UsageError: OpenVINO is not installed.
    """

    def __init__(self, part: nn.Module, *, bfloat16: bool) -> None:
        super().__init__()
        require("openvino", "openvino", "--backend openvino")
        from openvino import Core
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        self.weight_bytes = sum(tensor.nbytes for tensor in part.parameters())
        channels = next(module.in_channels for module in part.modules() if isinstance(module, nn.Conv2d))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns that tracing is old
            # Not by openvino.convert_model, which would tell Intel of each call.
            decoder = TorchScriptPythonDecoder(part, example_input=torch.zeros(1, channels, 32, 32))
            frontend = FrontEndManager().load_by_framework("pytorch")
            model = frontend.convert(frontend.load(decoder))
        model.reshape([-1, channels, -1, -1])
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # else all processes of a machine compute on the same core
        }
        self._compiled = Core().compile_model(model, "CPU", options)
        self._running = threading.Lock()  # one request is for one thread

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Run the part."""
        with self._running:
            result = self._compiled(values.contiguous().numpy(), share_inputs=True)[0]
            self._compiled.release_memory()  # else both models of a run hold the buffers of their largest windows
        return torch.from_numpy(result)


def read_onnx(path: Path) -> Callable[..., Any]:
    """Read a network from an ONNX file: it maps arrays to the array of its first output (raises `UsageError`)."""
    require("openvino", "openvino", str(path))
    from openvino import Core

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads(),
               "ENABLE_CPU_PINNING": False}  # fmt: skip
    try:
        core = Core()
        # From bytes, so that no other file is read: a key of the file alone would not cover its weights.
        compiled = core.compile_model(core.read_model(read_input(path)), "CPU", options)
    except Exception as error:  # noqa: BLE001 the file may hold anything
        raise UsageError(path, f"is no network in ONNX ({described(error)})", "export it again") from None
    running = threading.Lock()  # one request is for one thread

    def run(*arrays: Any) -> Any:
        with running:
            return compiled(list(arrays))[0].copy()

    return run
