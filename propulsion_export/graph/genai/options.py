"""What onnxruntime-genai's builder is asked for."""

from dataclasses import dataclass
from typing import Literal

from propulsion_export.artifacts.manifest import Dtype, ExecutionProvider, QuantizationEntry
from propulsion_export.errors import UsageError

# The activations that the builder has fused attention for, by execution provider.
_ACTIVATIONS: dict[ExecutionProvider, tuple[Dtype, ...]] = {
    "cpu": ("float32",),
    "cuda": ("float32", "float16", "bfloat16"),
    "dml": ("float16",),
    "webgpu": ("float32", "float16"),
}


@dataclass(frozen=True)
class GenaiOptions:
    """Options of the builder.

    Attributes:
        execution_provider: of ONNX Runtime, that the graph is built for.
        bits: of a quantised weight; None leaves weights in floating point.
        block_size: how many weights along a layer's input share a scale.
        accuracy_level: in what MatMulNBits computes, 1: float32, 4: int8 activations; None is the
            builder's default, 4 on the CPU and WebGPU, 0 (the runtime's choice) elsewhere.
    """

    execution_provider: ExecutionProvider = "cpu"
    bits: Literal[4, 8] | None = None
    block_size: int = 32
    accuracy_level: int | None = None

    def check_dtype(self, dtype: Dtype) -> None:
        """Refuse activations that the builder has no fused attention for.

        Raises:
            UsageError: naming those that it has.
        """
        fit = _ACTIVATIONS[self.execution_provider]
        if self.bits is not None and self.execution_provider == "cuda":
            fit = ("float16", "bfloat16") if self.bits == 4 else ("float16",)
        if dtype not in fit:
            raise UsageError(
                f"--dtype: the graph would be in {dtype}, onnxruntime-genai's builder has "
                f"{' and '.join(fit)} for the execution provider {self.execution_provider}",
                remedy=f"Give --dtype {fit[0]}, or --exporter transformers.",
            )

    def extra(self, dtype: Dtype) -> dict[str, object]:
        """The builder's extra options."""
        found: dict[str, object] = {
            # A cache of a window's length must never be empty, and takes no ragged batch.
            "windowed_kv_cache": False,
            "is_symmetric": True,  # without zero points
            "block_size": self.block_size,
            "use_webgpu_fp32": self.execution_provider == "webgpu" and dtype == "float32",
            "use_cuda_bf16": self.execution_provider == "cuda" and dtype == "bfloat16",
        }
        if self.accuracy_level is not None:
            found["accuracy_level"] = self.accuracy_level
        return found

    @property
    def quantization(self) -> QuantizationEntry | None:
        """What the manifest says about the weights."""
        if self.bits is None:
            return None
        level = self.accuracy_level
        if level is None:
            level = 4 if self.execution_provider in ("cpu", "webgpu") else 0
        return QuantizationEntry(self.bits, "matmulnbits", self.block_size, level)
