"""Check that a manifest's layout, inputs, outputs and task agree with each other."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from propulsion_export.artifacts.layout import width_of
from propulsion_export.artifacts.manifest import COPY_AGAIN, Manifest, TensorSpec
from propulsion_export.artifacts.tensor_names import BANK_INPUT, PACKED_INPUTS, PAST
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.errors import ArtifactError


def contradictions(manifest: Manifest) -> list[str]:
    """One text for each contradiction in a manifest; only edited or damaged ones have any."""
    return [*_misfit_layout(manifest), *_misfit_task(manifest)]


def check_consistent(directory: Path, manifest: Manifest) -> None:
    """Refuse a manifest that contradicts itself.

    Raises:
        ArtifactError: naming every contradiction.
    """
    if found := contradictions(manifest):
        raise inconsistent(directory, found)


def inconsistent(directory: Path, findings: Sequence[str]) -> ArtifactError:
    """The error for a manifest that contradicts itself or its graph."""
    return ArtifactError(
        *(f"{directory}: {finding}" for finding in findings),
        remedy=COPY_AGAIN,
    )


def differences(
    what: str, declared: Sequence[TensorSpec], found: Sequence[TensorSpec]
) -> Iterator[str]:
    """One text for each input or output of a graph that the manifest declares otherwise."""
    by_name = {spec.name: spec for spec in declared}
    for spec in found:
        if by_name.get(spec.name) != spec:
            record = _shown(by_name[spec.name]) if spec.name in by_name else "no such one"
            yield f"the graph has the {what} {_shown(spec)}, the manifest {record}"
    for name in by_name.keys() - {spec.name for spec in found}:
        yield f"the manifest has the {what} {name!r}, the graph no such one"
    if len(by_name) != len(declared):
        yield f"the manifest names an {what} twice"


def _misfit_task(manifest: Manifest) -> Iterator[str]:
    """The outputs and the cache that the manifest's task needs, but the graph does not have."""
    if not manifest.outputs:
        return  # a merged checkpoint, or several graphs, whose file names depend on the task
    cached = any(spec.name.startswith(f"{PAST}.") for spec in manifest.inputs)
    task = TASKS[manifest.task]
    if cached != (task.architecture == "decoder"):
        yield f"task is {task.name!r} of a graph {'with' if cached else 'without'} a cache"
    present = {(spec.name, len(spec.shape)) for spec in manifest.outputs}
    for output in task.outputs:
        if output.dimensions is not None and (output.name, output.dimensions) not in present:
            yield (
                f"task is {task.name!r}, which has an output {output.name!r} of "
                f"{output.dimensions} dimensions"
            )


def _misfit_layout(manifest: Manifest) -> Iterator[str]:
    if manifest.kind != "merged" and (manifest.mode == "folded") == bool(manifest.layout):
        yield f"mode is {manifest.mode!r}, the layout has {len(manifest.layout)} packed inputs"
    if list(manifest.layout) != [name for name in PACKED_INPUTS if name in manifest.layout]:
        yield (
            f"the layout has {', '.join(manifest.layout)} in this order, expected "
            f"{', '.join(PACKED_INPUTS)}"
        )
    inputs = [*manifest.inputs, *(i for graph in manifest.graphs.values() for i in graph.inputs)]
    adapter_inputs = (*PACKED_INPUTS, BANK_INPUT)
    # Every graph that has a packed input has all of it.
    shapes = {(spec.name, spec.shape[-1:]) for spec in inputs if spec.name in adapter_inputs}
    lengths = _lengths(manifest)
    for packed, shape in sorted(shapes, key=str):
        if shape != (lengths.get(packed, 0),):
            yield (
                f"{packed}: the layout has {lengths.get(packed, 0)} elements, the input's shape is "
                f"{list(shape)}"
            )
    for packed in sorted(lengths.keys() - {name for name, _ in shapes} - _built_in(manifest)):
        yield f"{packed}: the layout has {lengths[packed]} elements, the input's shape is none"


def _built_in(manifest: Manifest) -> set[str]:
    """The inputs that an engine has as weights."""
    options = {} if manifest.engine is None else manifest.engine.options
    if options.get("refit") != "scales" and options.get("bank") != "constant":
        return set()
    return {*PACKED_INPUTS, BANK_INPUT}


def _lengths(manifest: Manifest) -> dict[str, int]:
    """The number of elements that the layout gives each input for adapters."""
    if manifest.mode == "bank":
        return {BANK_INPUT: width_of(manifest.layout)}
    return {packed: sum(slot.length for slot in slots) for packed, slots in manifest.layout.items()}


def _shown(spec: TensorSpec) -> str:
    kind = "optional " if spec.optional else ""
    return f"{spec.name!r} ({kind}{spec.dtype} {list(spec.shape)})"
