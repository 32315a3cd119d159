"""The options that say how weights are quantised: refuse what does nothing, fill in defaults."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from propulsion_export.artifacts.manifest import ExecutionProvider, QuantizationEntry
from propulsion_export.errors import UsageError

QuantizedType = Literal["int4", "int8"]
QuantizationForm = Literal["matmulnbits", "qdq"]

_BLOCKS = (16, 32, 64, 128, 256)  # what MatMulNBits has kernels for
_DEFAULT_BLOCK = 32
# int8 activations inside the operator, as onnxruntime-genai's builder asks for where they exist.
_DEFAULT_LEVEL = 4
_HAVE_LEVELS = ("cpu", "webgpu")


@dataclass(frozen=True)
class QuantisationOptions:
    """Options of `onnx`, as they are given.

    Attributes:
        quantize: the integers that weights of linear layers become.
        form: the operators; None: matmulnbits.
        block_size: None: 32, or one scale for each output channel of int8 in the form `qdq`.
        accuracy_level: of MatMulNBits; None: 4 on the CPU and WebGPU, else 0.
        activations: quantise what linear layers read, too.
        calibration: file of texts that the scales of activations are measured on.
    """

    quantize: QuantizedType | None = None
    form: QuantizationForm | None = None
    block_size: int | None = None
    accuracy_level: int | None = None
    activations: bool = False
    calibration: Path | None = None

    def scheme(self, execution_provider: ExecutionProvider = "cpu") -> QuantizationEntry | None:
        """What the manifest records; None if nothing is quantised.

        Args:
            execution_provider: of ONNX Runtime, that the graph is for.

        Raises:
            UsageError: an option does nothing with the others, or has no such value.
        """
        if findings := [*self._without_effect(), *self._impossible()]:
            raise UsageError(*findings)
        if self.quantize is None:
            return None
        bits: Literal[4, 8] = 4 if self.quantize == "int4" else 8
        if self.form == "qdq":
            default = _DEFAULT_BLOCK if bits == 4 else 0
            block = default if self.block_size is None else self.block_size
            return QuantizationEntry(
                bits, "qdq", block, activations="int8" if self.activations else None
            )
        level = _DEFAULT_LEVEL if execution_provider in _HAVE_LEVELS else 0
        if self.accuracy_level is not None:
            level = self.accuracy_level
        return QuantizationEntry(bits, "matmulnbits", self.block_size or _DEFAULT_BLOCK, level)

    def check_untie(self, untie: bool) -> None:
        """Refuse to copy a tied weight: integers of a head are a copy already.

        Raises:
            UsageError: both are asked for.
        """
        if untie and self.quantize is not None:
            raise UsageError("--untie: does nothing with --quantize", remedy="Leave it out.")

    def check_dtype(self, dtype: str) -> None:
        """Refuse activations that a quantised graph has no kernels for.

        Raises:
            UsageError: the dtype is bfloat16.
        """
        if self.quantize is not None and dtype == "bfloat16":
            raise UsageError(
                f"--dtype: --quantize {self.quantize} with activations in bfloat16, expected "
                "float32 or float16: ONNX Runtime has no such kernels",
                remedy="Give --dtype float32 or --dtype float16.",
            )

    def _without_effect(self) -> list[str]:
        given = {
            "--quantization-form": self.form is not None,
            "--block-size": self.block_size is not None,
            "--accuracy-level": self.accuracy_level is not None,
            "--quantize-activations": self.activations,
            "--calibration": self.calibration is not None,
        }
        if self.quantize is None:
            return [
                f"{name}: does nothing without --quantize" for name, is_ in given.items() if is_
            ]
        found = []
        if self.form == "qdq" and self.accuracy_level is not None:
            found.append("--accuracy-level: does nothing with --quantization-form qdq")
        if self.calibration is not None and not self.activations:
            found.append("--calibration: does nothing without --quantize-activations")
        return found

    def _impossible(self) -> list[str]:
        found = []
        if self.activations and (self.quantize, self.form) != ("int8", "qdq") and self.quantize:
            found.append(
                f"--quantize-activations: found --quantize {self.quantize} in the form "
                f"{self.form or 'matmulnbits'}, expected --quantize int8 --quantization-form qdq"
            )
        if self.activations and self.calibration is None and self.quantize:
            found.append("--quantize-activations: expected texts to measure on, --calibration FILE")
        if self.activations and self.block_size is not None:
            found.append("--block-size: does nothing with --quantize-activations")
        size = self.block_size
        if size is not None and self.form != "qdq" and size not in _BLOCKS:
            blocks = ", ".join(map(str, _BLOCKS))
            found.append(f"--block-size: found {size}, expected one of {blocks} for matmulnbits")
        return found
