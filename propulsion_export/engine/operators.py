"""Refuse graphs with operators that TensorRT lacks."""

import onnx_ir as ir

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.errors import ArtifactError, UnavailableError
from propulsion_export.graph.files import all_graphs


def check_exporter(artifact: Artifact) -> None:
    """Refuse a graph of onnxruntime-genai's builder, made of ONNX Runtime's own operators.

    Raises:
        ArtifactError: it is one.
    """
    manifest = artifact.manifest
    if manifest.exporter == "genai":
        form = " --quantization-form qdq" if manifest.quantization else ""
        raise ArtifactError(
            f"{artifact.shown}: is a graph of onnxruntime-genai's builder, with operators of "
            "ONNX Runtime (GroupQueryAttention) that TensorRT lacks",
            remedy=f"Export with --exporter transformers{form}.",
        )


def check_operators(model: ir.Model, name: str) -> None:
    """Refuse, with the node's name, a graph that TensorRT would refuse without one.

    The exporter counts the tokens of each expert with a ScatterElements that adds.

    Raises:
        UnavailableError: the model, called `name`, has an operator that TensorRT lacks.
    """
    packed = next((node for node in model.graph if node.op_type == "MatMulNBits"), None)
    if packed is not None:
        raise UnavailableError(
            f"{name}: its node {packed.name!r} is a MatMulNBits, ONNX Runtime's own operator, "
            "expected integers behind a DequantizeLinear",
            remedy="Export it again with --exporter transformers --quantization-form qdq.",
        )
    adding = [
        f"{name}: its node {node.name!r} is a ScatterElements that adds up, as in a mixture of "
        "experts, which TensorRT cannot build; expected a model without experts"
        for graph in all_graphs(model)
        for node in graph
        if node.op_type == "ScatterElements" and _reduction(node) != "none"
    ]
    if adding:
        raise UnavailableError(adding[0], remedy="Run its ONNX export in ONNX Runtime.")


def _reduction(node: ir.Node) -> str:
    attribute = node.attributes.get("reduction")
    return "none" if attribute is None else str(attribute.value)
