"""The options of `onnx` that are the same for all modes, and what is refused of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.manifest import (
    DEFAULT_OPSET,
    ExecutionProvider,
    Mode,
    QuantizationEntry,
)
from propulsion_export.errors import UsageError
from propulsion_export.graph.slots import SlotOptions
from propulsion_export.pipeline.mode_options import check_mode_options
from propulsion_export.pipeline.producing import ExporterChoice
from propulsion_export.pipeline.quantisation_options import (
    QuantisationOptions,
    QuantizationForm,
    QuantizedType,
)


@dataclass(frozen=True)
class OnnxOptions:
    """How to export, whatever the modes; the fields are parameters of `export_onnx`."""

    model: str | None = None
    task: str = "auto"
    dtype: str = "keep"
    opset: int = DEFAULT_OPSET
    exporter: ExporterChoice = "auto"
    execution_provider: ExecutionProvider = "cpu"
    quantize: QuantizedType | None = None
    quantization_form: QuantizationForm | None = None
    block_size: int | None = None
    accuracy_level: int | None = None
    quantize_activations: bool = False
    calibration: Path | None = None
    untie: bool = False
    allow_range: bool = False
    placement: str | None = None
    max_labels: int | None = None
    train_bias: bool = False
    force: bool = False
    trust_remote_code: bool = False

    @property
    def slots(self) -> SlotOptions:
        """Which slots to make for adapters to come."""
        return SlotOptions(self.placement, self.max_labels, self.train_bias)

    @property
    def quantising(self) -> QuantisationOptions:
        """How to quantise."""
        return QuantisationOptions(
            self.quantize,
            self.quantization_form,
            self.block_size,
            self.accuracy_level,
            self.quantize_activations,
            self.calibration,
        )


def check_options(
    modes: Sequence[Mode], options: OnnxOptions, adapters: int
) -> QuantizationEntry | None:
    """Refuse options that do nothing; returns how weights are quantised.

    Args:
        modes: how the adapters are exported.
        options: the options.
        adapters: how many adapters are exported.

    Raises:
        UsageError: no mode is given, or options do nothing.
    """
    if not modes:
        raise UsageError("no mode is given, expected folded, switchable or bank")
    quantising = options.quantising
    scheme = quantising.scheme(options.execution_provider)
    quantising.check_dtype(options.dtype)
    quantising.check_untie(options.untie)
    untie, allow_range = options.untie, options.allow_range
    check_mode_options(modes, untie=untie, allow_range=allow_range, adapters=adapters)
    return scheme


def check_slots(options: SlotOptions, modes: Sequence[Mode], adapters: Sequence[Adapter]) -> None:
    """Refuse options for slots where the adapters themselves decide, or where there are none.

    Raises:
        UsageError: naming each of the options.
    """
    only_folded = set(modes) == {"folded"}
    if not options.given or (not only_folded and not adapters):
        return
    found = "--mode folded" if only_folded else "adapters given by -a"
    raise UsageError(
        *(f"{option}: is for slots without adapters, found {found}" for option in options.given),
        remedy="Leave it out." if adapters else "Export with --mode switchable or bank.",
    )
