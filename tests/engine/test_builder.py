"""Real engines, built with tensorrt-rtx, which needs no GPU."""

from dataclasses import replace

import pytest

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.engine import BuildOptions, onnx_digest, write_engine
from propulsion_export.engine.builder import (
    _configure,
    _mark_refittable,
    _plan_job,
    build,
    read_timing_cache,
    set_targets,
)
from propulsion_export.engine.network import parse
from propulsion_export.errors import ArtifactError, ToolError, UsageError
from propulsion_export.graph.files import read_graph
from propulsion_export.graph.passes.required_inputs import require_inputs_

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra rtx)")

SM86 = BuildOptions(runtime="tensorrt-rtx", targets=("sm_86",))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("target", ["sm_86", "sm_89", "sm_120"])
def test_an_engine_is_built_in_the_dtype_of_the_graph(folded, out, dtype, target):
    options = replace(SM86, targets=(target,))

    manifest = write_engine(folded(dtype), out, options)

    assert (out / "model.engine").stat().st_size > 10_000
    assert [spec.dtype for spec in manifest.outputs] == [dtype]
    assert manifest.engine.targets == (target,)


def test_the_written_artifact_can_be_read_back(switchable, out):
    source = switchable()

    written = Artifact.write(out, write_engine(source, out, SM86))

    assert Artifact.read(out) == written
    assert written.path.is_file()
    assert written.manifest.engine.runtime == "tensorrt-rtx"
    assert written.manifest.engine.version == trt.__version__
    assert written.manifest.engine.onnx_digest == onnx_digest(source)


def test_what_identifies_the_model_is_kept_and_the_graph_is_left_behind(switchable, out):
    source = switchable()

    manifest = write_engine(source, out, SM86)

    kept = ("mode", "task", "dtype", "base", "adapters", "layout")
    assert [getattr(manifest, name) for name in kept] == [
        getattr(source.manifest, name) for name in kept
    ]
    names = sorted(file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file())
    feeds = ["adapters/base.safetensors", "adapters/legal.safetensors"]
    assert names == [*feeds, "config.json", "model.engine"]
    assert manifest.tools["torch"] == "2.11.0"
    assert manifest.tools["tensorrt-rtx"] == trt.__version__


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_scales_are_a_required_input_of_the_engine(switchable, out, dtype):
    manifest = write_engine(switchable(dtype), out, SM86)

    scales = manifest.inputs[-1]
    assert (scales.name, scales.dtype, scales.shape) == ("propulsion_scales", dtype, (2,))
    assert not scales.optional
    assert "propulsion_scales" not in manifest.engine.profiles[0]


def test_with_their_default_left_in_the_scales_are_dropped_and_that_is_noticed(switchable):
    source = switchable()
    graph = read_graph(source.directory)

    with pytest.raises(ToolError, match="dropped the input 'propulsion_scales'"):
        parse(trt, graph, source.directory)


def test_symbolic_dimensions_keep_the_names_of_the_manifest(folded, out):
    manifest = write_engine(folded(), out, SM86)

    assert [spec.shape for spec in manifest.inputs] == [("batch", "sequence")] * 2
    assert manifest.outputs[0].shape == ("batch", "sequence", 2)


def test_the_profile_obeys_given_shapes_and_the_positions_of_the_model(folded, out):
    options = replace(SM86, opt_shapes={"input_ids": (4, 16)}, max_shapes={"input_ids": (6, 64)})

    manifest = write_engine(folded(), out, options)

    expected = {"min": [1, 1], "opt": [4, 16], "max": [6, 64]}
    assert manifest.engine.profiles == ({"input_ids": expected, "attention_mask": expected},)


def test_one_engine_is_built_for_several_gpus(folded, tmp_path):
    source, sizes = folded(), []
    for targets in (("sm_86",), ("sm_86", "sm_89", "sm_120")):
        out = tmp_path / str(len(targets))
        out.mkdir()
        assert write_engine(source, out, replace(SM86, targets=targets)).engine.targets == targets
        sizes.append((out / "model.engine").stat().st_size)

    assert sizes[1] > sizes[0]


def test_steps_are_told_in_words(folded, out):
    told = []

    write_engine(folded(), out, SM86, told.append)

    assert told[0] == "parsing model.onnx"
    assert told[1].startswith("building for sm_86 with tensorrt-rtx ")


def test_options_that_shape_the_engine_are_recorded(folded, out):
    options = replace(SM86, builder_optimization_level=1, workspace=64)

    recorded = write_engine(folded(), out, options).engine.options

    assert recorded["builder_optimization_level"] == 1
    assert recorded["workspace"] == 64


def test_float32_products_are_not_rounded_to_tf32(folded):
    source = folded()
    graph = read_graph(source.directory)

    config = _configure(_plan_job(source, SM86), parse(trt, graph, source.directory))

    assert not config.get_flag(trt.BuilderFlag.TF32)


def test_a_refused_graph_names_the_node_and_writes_nothing(artifact, graph, out):
    model = graph(FUSED)

    with pytest.raises(ToolError, match=r"node 'fused' \(BiasGelu\)") as refusal:
        write_engine(artifact(model), out, SM86)

    assert "cudaError" not in str(refusal.value)
    assert not list(out.iterdir())


def test_mixed_types_are_refused_without_the_noise_of_a_missing_driver(artifact, graph, out):
    model = graph(MIXED)

    with pytest.raises(ToolError, match=r"node 'mix' \(Mul\).*Float and Half") as refusal:
        write_engine(artifact(model), out, SM86)

    assert "cudaError" not in str(refusal.value)


def test_inputs_whose_maximum_shapes_exclude_each_other_are_refused(artifact, graph, out):
    source = artifact(graph(TWO_BATCHES))
    source = _with_symbols(source, ("batch", "sequence"), ("other", "sequence"))
    options = replace(
        SM86,
        opt_shapes={"input_ids": (2, 8), "attention_mask": (2, 8)},
        max_shapes={"input_ids": (4, 8), "attention_mask": (6, 8)},
    )

    with pytest.raises(ToolError, match="not self-consistent"):
        write_engine(source, out, options)


def test_only_an_onnx_artifact_can_be_built(folded, out):
    source = folded()
    merged = Artifact(source.directory, replace(source.manifest, kind="merged"))

    with pytest.raises(ArtifactError, match="is a merged artifact, expected onnx"):
        write_engine(merged, out, SM86)


def test_a_manifest_that_does_not_know_an_input_is_refused(folded, out):
    source = folded()
    lacking = Artifact(
        source.directory, replace(source.manifest, inputs=source.manifest.inputs[:1])
    )

    with pytest.raises(ArtifactError, match="has 'attention_mask' of 2 dimensions"):
        write_engine(lacking, out, SM86)


def test_sm_90_is_refused_before_anything_is_built(folded, out):
    with pytest.raises(UsageError, match=r"found sm_90.*sm_86, sm_89, sm_120"):
        write_engine(folded(), out, replace(SM86, targets=("sm_90",)))

    assert not list(out.iterdir())


def test_errors_that_tensorrt_only_logs_are_raised(folded):
    network, config = _configured(folded())
    config.builder_optimization_level = -1

    with pytest.raises(ToolError, match="Valid values include integers from 0"):
        build(network, config, None)


def test_a_missing_profile_is_an_error(folded):
    network, config = _configured(folded())

    with pytest.raises(ToolError, match="no optimization profile has been defined"):
        build(network, config, None)


def test_building_nothing_without_a_reason_is_an_error(folded):
    network, config = _configured(folded())

    class Silent:
        def build_serialized_network(self, definition, config):
            return None

    with pytest.raises(ToolError, match="built no engine and did not say why"):
        build(replace(network, builder=Silent()), config, None)


@pytest.mark.parametrize("fused_only", [False, True])
def test_an_attention_node_builds_in_float32_because_it_may_be_decomposed(
    artifact, graph, fused_only
):
    network, config = _configured(artifact(graph(ATTENTION)))
    profile = network.builder.create_optimization_profile()
    for name in ("q", "k", "v"):
        profile.set_shape(name, (1, 2, 1, 16), (2, 2, 8, 16), (4, 2, 16, 16))
    config.add_optimization_profile(profile)

    if fused_only:
        layers = [network.definition.get_layer(i) for i in range(network.definition.num_layers)]
        attention = next(layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT)
        attention.__class__ = trt.IAttentionInputLayer
        attention.attention.decomposable = False
        with pytest.raises(ToolError, match="not supported by a dedicated kernel"):
            build(network, config, None)
    else:
        assert len(build(network, config, None)) > 10_000


def test_refit_makes_the_scales_weights_that_can_be_replaced(switchable):
    source = switchable()
    model = read_graph(source.directory)
    require_inputs_(model, constant=("propulsion_scales",))
    network = parse(trt, model, source.directory)
    config = network.builder.create_builder_config()

    _mark_refittable(trt, network, config, ("propulsion_scales",))

    assert [tensor.name for tensor in network.inputs] == ["input_ids", "attention_mask"]
    assert network.definition.are_weights_marked_refittable("propulsion_scales")
    assert not network.definition.are_weights_marked_refittable("weight")
    assert config.get_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)


def test_the_digest_changes_with_the_weights_alone(folded):
    source = folded()
    before = onnx_digest(source)
    data = source.directory / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(content)

    after = onnx_digest(Artifact.write(source.directory, source.manifest))

    assert after != before


class FakeConfig:
    """Stands for the configuration of tensorrt; that of tensorrt-rtx has no timing cache."""

    def __init__(self, fits=True):
        self.fits = fits
        self.given = None

    def create_timing_cache(self, content):
        return content

    def set_timing_cache(self, cache, ignore_mismatch):
        self.given = cache
        return self.fits and not ignore_mismatch


def test_a_timing_cache_is_read_where_there_is_one_and_empty_at_first(tmp_path):
    file, config = tmp_path / "cache", FakeConfig()

    read_timing_cache(config, file)
    assert config.given == b""

    file.write_bytes(b"measured")
    read_timing_cache(config, file)
    assert config.given == b"measured"


def test_a_timing_cache_of_another_gpu_is_refused(tmp_path):
    with pytest.raises(ToolError, match="no timing cache of this version and GPU"):
        read_timing_cache(FakeConfig(fits=False), tmp_path / "cache")


def _configured(source):
    graph = read_graph(source.directory)
    require_inputs_(graph)
    network = parse(trt, graph, source.directory)
    config = network.builder.create_builder_config()
    set_targets(trt, config, ("sm_86",))
    return network, config


def _with_symbols(source, *shapes):
    inputs = tuple(
        replace(spec, shape=shape)
        for spec, shape in zip(source.manifest.inputs, shapes, strict=True)
    )
    return Artifact(source.directory, replace(source.manifest, inputs=inputs))


FUSED = """
<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
graph (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask)
    => (float[batch, sequence] logits) {
    sum = Add (input_ids, attention_mask)
    hidden = Cast <to = 1> (sum)
    [fused] logits = com.microsoft.BiasGelu (hidden, hidden)
}
"""
MIXED = """
<ir_version: 10, opset_import: ["" : 20]>
graph (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask)
    => (float[batch, sequence] logits) {
    hidden = Cast <to = 1> (input_ids)
    mask = Cast <to = 10> (attention_mask)
    [mix] logits = Mul (hidden, mask)
}
"""
TWO_BATCHES = """
<ir_version: 10, opset_import: ["" : 20]>
graph (int64[batch, sequence] input_ids, int64[other, sequence] attention_mask)
    => (int64[batch, sequence, 2] logits) {
    sum = Add (input_ids, attention_mask)
    axis = Constant <value_ints = [2]> ()
    column = Unsqueeze (sum, axis)
    logits = Concat <axis = 2> (column, column)
}
"""
ATTENTION = """
<ir_version: 10, opset_import: ["" : 23]>
graph (float[batch, 2, sequence, 16] q, float[batch, 2, sequence, 16] k,
       float[batch, 2, sequence, 16] v) => (float[batch, 2, sequence, 16] y) {
    y = Attention (q, k, v)
}
"""
