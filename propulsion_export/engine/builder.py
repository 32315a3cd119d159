"""Build an engine from an ONNX artifact."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.bank import Bank
from propulsion_export.artifacts.file_names import ENGINE_FILE, GRAPH_FILE
from propulsion_export.artifacts.manifest import EngineEntry, Manifest
from propulsion_export.artifacts.staging import replace_file
from propulsion_export.artifacts.tensor_names import BANK_INPUT
from propulsion_export.base_model.config import read_settings
from propulsion_export.engine.network import Network, parse, specs_of
from propulsion_export.engine.operators import check_exporter, check_operators
from propulsion_export.engine.options import BuildOptions, check_options
from propulsion_export.engine.profiles import Profile, choose_profiles, longest_sequence
from propulsion_export.engine.targets import (
    EngineRuntime,
    choose_runtime,
    choose_targets,
    compute_capability,
    load,
)
from propulsion_export.environment.machine import tool_versions
from propulsion_export.errors import ArtifactError, ToolError, UnavailableError
from propulsion_export.graph.files import read_graph
from propulsion_export.graph.passes.required_inputs import (
    adapter_inputs,
    give_default_,
    require_inputs_,
)

_MEBIBYTE = 2**20
_COMPATIBILITY = {"ampere+": "AMPERE_PLUS", "same-cc": "SAME_COMPUTE_CAPABILITY"}


@dataclass(frozen=True)
class _Job:
    """A checked build: TensorRT's module, the GPUs, the shapes and the options."""

    trt: Any
    runtime: EngineRuntime
    targets: tuple[str, ...]
    profiles: tuple[Profile, ...]
    options: BuildOptions


def write_engine(
    artifact: Artifact,
    directory: Path,
    options: BuildOptions,
    progress: Callable[[str], None] | None = None,
) -> Manifest:
    """Write `model.engine` and the other files of an engine artifact into an empty directory.

    The scales of a switchable artifact become an input that must be fed: TensorRT has no defaults.
    A bank stays an input, unless it is built in.

    Args:
        artifact: of kind `onnx`.
        directory: exists and is empty; the caller writes the manifest.
        options: how to build.
        progress: called at each step with a line that describes it.

    Returns:
        The engine's manifest, inputs and outputs as in the network that was built.

    Raises:
        UsageError: options that contradict each other, the model or the target.
        UnavailableError: the runtime is not installed, this machine lacks the GPU it needs, or
            TensorRT has no engine for such a model: an encoder-decoder, a mixture of experts.
        ArtifactError: the artifact is not ONNX, keeps weights outside its directory, or has
            operators of ONNX Runtime that TensorRT lacks.
        ToolError: TensorRT refuses the graph, drops a part of it or builds nothing.
    """
    if artifact.manifest.kind != "onnx":
        raise ArtifactError(
            f"{artifact.shown}: is a {artifact.manifest.kind} artifact, expected onnx"
        )
    check_exporter(artifact)
    _check_one_graph(artifact)
    job = _plan_job(artifact, options)
    report = progress or (lambda _: None)
    report(f"parsing {GRAPH_FILE}")
    graph = read_graph(artifact.directory)
    check_operators(graph, _model_name(artifact))
    built_in = _build_in_(graph, artifact, directory, options)
    require_inputs_(graph, constant=built_in)
    network = parse(job.trt, graph, artifact.directory)
    manifest = _manifest(artifact, network, job)
    report(f"building for {', '.join(job.targets)} with {job.runtime} {job.trt.__version__}")
    config = _configure(job, network)
    _mark_refittable(job.trt, network, config, built_in if options.refit == "scales" else ())
    plan = build(network, config, options.timing_cache)
    (directory / ENGINE_FILE).write_bytes(plan)
    _copy_rest(artifact, directory)
    if manifest.mode == "bank" and not built_in:
        artifact.open_bank().copy(directory)
    return manifest


def onnx_digest(artifact: Artifact) -> str:
    """`sha256:…` over the graph and its weights, which lie in a file of their own."""
    lines = sorted(
        f"{name} {digest}\n" for name, digest in artifact.manifest.files.items() if _is_graph(name)
    )
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def build(network: Network, config: Any, timing_cache: Path | None) -> memoryview:
    """The engine's bytes; the timing cache is read where it exists, and written afterwards.

    Raises:
        ToolError: TensorRT logged an error, here or while it was configured, or built nothing.
    """
    if timing_cache is not None:
        read_timing_cache(config, timing_cache)
    network.log.check(GRAPH_FILE)
    plan = network.builder.build_serialized_network(network.definition, config)
    network.log.check(GRAPH_FILE)
    if plan is None:
        raise ToolError(f"{GRAPH_FILE}: TensorRT built no engine and did not say why")
    if timing_cache is not None:
        replace_file(timing_cache, bytes(config.get_timing_cache().serialize()))
    return memoryview(plan)


def read_timing_cache(config: Any, file: Path) -> None:
    """Give the builder its earlier measurements; the first time, an empty cache to fill."""
    content = file.read_bytes() if file.exists() else b""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not config.set_timing_cache(config.create_timing_cache(content), False):
        raise ToolError(
            f"{file}: is no timing cache of this version and GPU",
            remedy="Remove it, or name another file.",
        )


def set_targets(trt: Any, config: Any, targets: tuple[str, ...]) -> None:
    """Set the GPUs to build for; TensorRT-RTX only.

    Raises:
        ToolError: TensorRT refuses one of them.
    """
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        capability = trt.ComputeCapability(compute_capability(target))
        if not config.set_compute_capability(capability, index):
            raise ToolError(f"--target: TensorRT refuses {target}")


def _check_one_graph(artifact: Artifact) -> None:
    if artifact.manifest.graphs:
        raise UnavailableError(
            f"{_model_name(artifact)}: is exported as {len(artifact.manifest.graphs)} graphs "
            f"({', '.join(artifact.manifest.graphs)}), expected one: no engine is built of an "
            "encoder-decoder yet",
            remedy="Run its ONNX export in ONNX Runtime.",
        )


def _model_name(artifact: Artifact) -> str:
    """The class that config.json names; without one, the directory."""
    classes = read_settings(artifact.directory).get("architectures") or ()
    return str(next(iter(classes), artifact.shown))


def _plan_job(artifact: Artifact, options: BuildOptions) -> _Job:
    manifest = artifact.manifest
    runtime = choose_runtime(options.runtime)
    check_options(options, runtime, manifest.mode)
    targets = choose_targets(options.targets, runtime, manifest.dtype)
    given = (options.min_shapes, options.opt_shapes, options.max_shapes)
    longest = longest_sequence(read_settings(artifact.directory))
    gone = {BANK_INPUT} if _builds_in(options) else set()
    inputs = [spec for spec in manifest.inputs if spec.name not in gone]
    profiles = choose_profiles(inputs, given, longest)
    return _Job(load(runtime), runtime, targets, profiles, options)


def _builds_in(options: BuildOptions) -> bool:
    return options.refit == "scales" or options.bank == "constant"


def _build_in_(
    graph: ir.Model, artifact: Artifact, directory: Path, options: BuildOptions
) -> tuple[str, ...]:
    """The inputs that become weights of the engine; a bank gets the rows of the engine's copy."""
    if not _builds_in(options):
        return ()
    if artifact.manifest.mode == "bank":
        artifact.open_bank().copy(directory)
        give_default_(graph, BANK_INPUT, Bank.open(directory).values())
    return adapter_inputs(graph)


def _manifest(artifact: Artifact, network: Network, job: _Job) -> Manifest:
    source = artifact.manifest
    entry = EngineEntry(
        runtime=job.runtime,
        version=job.trt.__version__,
        targets=job.targets,
        profiles=job.profiles,
        options=dict(job.options.recorded()),
        onnx_digest=onnx_digest(artifact),
    )
    return replace(
        source,
        kind="engine",
        inputs=specs_of(network.inputs, source.inputs),
        outputs=specs_of(network.outputs, source.outputs),
        engine=entry,
        # The export's versions stay; TensorRT's is the one of this build.
        tools=tool_versions() | source.tools | {job.runtime: job.trt.__version__},
        files={},
    )


def _configure(job: _Job, network: Network) -> Any:
    trt, options = job.trt, job.options
    config = network.builder.create_builder_config()
    # On by default, it rounds a float32 model's products to 10 bits: precision is the graph's.
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatibility != "none":
        level = _COMPATIBILITY[options.hardware_compatibility]
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if options.builder_optimization_level is not None:
        config.builder_optimization_level = options.builder_optimization_level
    if options.workspace is not None:
        limit = options.workspace * _MEBIBYTE
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, limit)
    if job.runtime == "tensorrt-rtx":
        set_targets(trt, config, job.targets)
    for profile in job.profiles:
        _add_profile(network, config, profile)
    return config


def _add_profile(network: Network, config: Any, profile: Profile) -> None:
    entry = network.builder.create_optimization_profile()
    for name, shapes in profile.items():
        try:
            entry.set_shape(name, shapes["min"], shapes["opt"], shapes["max"])
        except (RuntimeError, ValueError) as error:
            raise ToolError(f"{name}: TensorRT refuses the shapes {shapes} ({error})") from error
    added = config.add_optimization_profile(entry)
    network.log.check("shapes")
    if added < 0:
        raise ToolError(f"shapes: TensorRT refuses the profile {profile}")


def _mark_refittable(trt: Any, network: Network, config: Any, weights: tuple[str, ...]) -> None:
    """Mark only these weights, so that the rest of the network keeps its fusions."""
    if not weights:
        return
    config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    unknown = [name for name in weights if not network.definition.mark_weights_refittable(name)]
    if unknown:
        raise ToolError(*(f"{name}: TensorRT has no weights of that name" for name in unknown))


def _copy_rest(artifact: Artifact, directory: Path) -> None:
    """Copy all recorded files except the graph: adapters, config.json and the tokenizer."""
    for name in artifact.manifest.files:
        if not _is_graph(name):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.directory / name, directory / name)


def _is_graph(name: str) -> bool:
    return name.startswith(GRAPH_FILE)
