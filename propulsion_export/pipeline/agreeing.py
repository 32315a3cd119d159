"""Does the manifest say of the graph what the graph is?"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, get_args

from propulsion_export.artifact import Artifact
from propulsion_export.errors import ArtifactError
from propulsion_export.manifest import PACKED_INPUTS, Dtype, Manifest, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir


def check_signature(artifact: Artifact, *, graph: bool = True) -> None:
    """Refuse a manifest that differs from its graph; only of ONNX artifacts the graph is read.

    Weights stay on disk; without `graph` the manifest is only held against itself. An edited
    manifest would else choose the tolerance (its dtype) or what is fed.

    Raises:
        ArtifactError: naming every difference.
    """
    manifest = artifact.manifest
    findings = list(_misfit_layout(manifest))
    if graph and manifest.kind == "onnx":
        from propulsion_export.engine.source import read_graph
        from propulsion_export.graph.finishing import signature

        model = read_graph(artifact.directory)
        inputs, outputs = signature(model)
        findings += _differences("input", manifest.inputs, inputs)
        findings += _differences("output", manifest.outputs, outputs)
        findings += _other_dtype(manifest, model)
    if findings:
        raise ArtifactError(
            *(f"{artifact.directory}: {finding}" for finding in findings),
            remedy="Copy the whole directory again, or export again.",
        )


def _differences(
    what: str, told: Sequence[TensorSpec], found: Sequence[TensorSpec]
) -> Iterator[str]:
    by_name = {spec.name: spec for spec in told}
    for spec in found:
        if by_name.get(spec.name) != spec:
            record = _shown(by_name[spec.name]) if spec.name in by_name else "no such one"
            yield f"the graph has the {what} {_shown(spec)}, the manifest {record}"
    for name in by_name.keys() - {spec.name for spec in found}:
        yield f"the manifest has the {what} {name!r}, the graph no such one"
    if len(by_name) != len(told):
        yield f"the manifest names an {what} twice"


def _shown(spec: TensorSpec) -> str:
    kind = "optional " if spec.optional else ""
    return f"{spec.name!r} ({kind}{spec.dtype} {list(spec.shape)})"


def _other_dtype(manifest: Manifest, graph: "ir.Model") -> Iterator[str]:
    """Some models compute outputs in float32 whatever their weights are, so these count too."""
    values = (*graph.graph.outputs, *graph.graph.initializers.values())
    present = {str(value.dtype.numpy()) for value in values if value.dtype is not None}
    floating = present & set(get_args(Dtype))
    if floating and manifest.dtype not in floating:
        yield f"the graph is in {', '.join(sorted(floating))}, the manifest says {manifest.dtype}"


def _misfit_layout(manifest: Manifest) -> Iterator[str]:
    if manifest.kind != "merged" and (manifest.mode == "switchable") != bool(manifest.layout):
        yield f"mode is {manifest.mode!r}, the layout has {len(manifest.layout)} packed inputs"
    shapes = {spec.name: spec.shape for spec in manifest.inputs if spec.name in PACKED_INPUTS}
    for packed in sorted(shapes.keys() | manifest.layout.keys()):
        length = sum(slot.length for slot in manifest.layout.get(packed, ()))
        if shapes.get(packed) != (length,):
            told = list(shapes[packed]) if packed in shapes else "none"
            yield f"{packed}: the layout has {length} elements, the input's shape is {told}"
