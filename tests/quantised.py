"""Quantised exports for tests, made by ONNX Runtime's own quantiser of whole graphs.

| function | gives |
|---|---|
| `quantise_artifact(source, directory, ...)` | a copy of an export, its linear layers quantised |
| `fold_quantised(switchable, directory, name, scheme)` | the same with an adapter folded in |
| `edit_graph(directory)` | a context with the onnx model of an artifact, written back afterwards |
"""

import shutil
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
    QuantFormat,
)

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.manifest import QuantizationEntry, read_manifest
from propulsion_export.artifacts.tensor_names import SCALES_INPUT
from propulsion_export.graph.files import write_graph
from propulsion_export.graph.quantisation import FoldScales, QuantiseWeights
from propulsion_export.graph.signature import signature
from propulsion_export.scaling.attach import initializer_name


def quantise_artifact(source, directory, *, bits=4, form="matmulnbits", level=4):
    shutil.copytree(source, directory)
    config = DefaultWeightOnlyQuantConfig(
        block_size=32,
        is_symmetric=True,
        accuracy_level=level,
        quant_format=QuantFormat.QDQ if form == "qdq" else QuantFormat.QOperator,
        bits=bits,
    )
    with edit_graph(directory, QuantizationEntry(bits, form, 32, level)) as model:
        MatMulNBitsQuantizer(model, algo_config=config).process()
    return directory


@contextmanager
def edit_graph(directory, entry=None):
    model = onnx.load(directory / "model.onnx")
    yield model
    (directory / "model.onnx.data").unlink(missing_ok=True)
    onnx.save_model(
        model,
        directory / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=1024,
    )
    manifest = read_manifest(directory / "propulsion.json")
    Artifact.write(directory, replace(manifest, quantization=entry or manifest.quantization))


def fold_quantised(switchable, directory, name, scheme, *, mistake=None, source=None):
    """A folded artifact of a switchable float export: quantised once, then folded into the scales.

    `mistake(values)` may change the scales, by the name of their initializer, before they are.
    `source` is the directory of another adapter for the same slots.
    """
    artifact = Artifact.read(switchable)
    layout = artifact.manifest.layout[SCALES_INPUT]
    shutil.copytree(switchable, directory)
    model = ir.load(switchable / "model.onnx")
    _unpack_(model, layout)
    entry = artifact.manifest.adapters[name]
    read = Adapter.read(source or entry.source, name)
    values = {
        initializer_name(slot.path, slot.side, len(slot.shape)): read.scales[slot.path].values
        for slot in layout
    }
    model.opset_imports[""], model.ir_version = 21, 10  # which int4 needs
    # Blocks of a DequantizeLinear must fill the 37 inputs of these layers, which none does.
    keep = [name for name, value in model.graph.initializers.items() if 37 in value.shape]
    QuantiseWeights(scheme, keep if scheme.form == "qdq" and scheme.block_size else ())(model)
    FoldScales(mistake(values) if mistake else values)(model)
    RemoveUnusedNodesPass()(model)
    (directory / "model.onnx.data").unlink(missing_ok=True)
    write_graph(model, directory)
    shutil.rmtree(directory / "adapters")
    inputs, outputs = signature(model)
    Artifact.write(
        directory,
        replace(
            artifact.manifest,
            mode="folded",
            layout={},
            inputs=inputs,
            outputs=outputs,
            adapters={
                name: replace(
                    entry, file=None, digest=read.digest, source=str(source or entry.source)
                )
            },
            quantization=scheme,
        ),
    )
    return directory


def _unpack_(model, layout):
    """Give every scale an initializer of its own again."""
    graph = model.graph
    for slot in layout:
        name = initializer_name(slot.path, slot.side, len(slot.shape))
        (part,) = [o for node in graph for o in node.outputs if o.name == f"{name}.part"]
        value = ir.Value(name=name, type=part.type, shape=part.shape)
        value.const_value = ir.tensor(np.full(slot.shape, 2, np.float32), name=name)
        graph.initializers[name] = value
        ir.convenience.replace_all_uses_with(part, value)
    packed = next(value for value in graph.inputs if value.name == SCALES_INPUT)
    RemoveUnusedNodesPass()(model)
    graph.inputs.remove(packed)
    graph.initializers.pop(SCALES_INPUT, None)
