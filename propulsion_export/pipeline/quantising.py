"""Prepare the quantisation of an export: measure activations where they are quantised."""

from collections.abc import Sequence
from pathlib import Path

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.head_room import with_room
from propulsion_export.artifacts.manifest import QuantizationEntry
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.graph.quantisation.calibration import measure_inputs
from propulsion_export.graph.quantisation.quantise import Quantisation
from propulsion_export.parity.inputs import make_batches


def quantisation_of(
    base: BaseModel,
    adapters: Sequence[Adapter],
    scheme: QuantizationEntry | None,
    calibration: Path | None,
    *,
    trust_remote_code: bool = False,
) -> Quantisation | None:
    """How to quantise the graphs of `base`, which computes in its own precision still.

    Args:
        base: the base model, with room for the heads of adapters.
        adapters: ranges of activations are measured with each of them, and with none.
        scheme: None: nothing is quantised.
        calibration: file of texts; given if the scheme quantises activations.
        trust_remote_code: run code that the tokenizer brings.

    Raises:
        DataError: the file cannot be read, or has too few texts.
        UsageError: there is no tokenizer to read texts with.
    """
    if scheme is None:
        return None
    if calibration is None:
        return Quantisation(scheme)
    batches = make_batches(base, calibration, 0, short=False, trust_remote_code=trust_remote_code)
    roomy = [with_room(adapter, base.room, base.label_parameters) for adapter in adapters]
    return Quantisation(scheme, measure_inputs(base.model, batches, roomy))


def describe(scheme: QuantizationEntry | None) -> str:
    """What to tell people about a quantisation, behind the dtype; empty without one."""
    if scheme is None:
        return ""
    activations = f" and {scheme.activations} activations" if scheme.activations else ""
    needed = Quantisation(scheme).opset
    raised = f", opset {needed} or newer, as blocks of integers need" if needed > 1 else ""
    return f" with int{scheme.bits} weights{activations} ({scheme.form}{raised})"
