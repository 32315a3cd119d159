"""ONNX artifact to engine artifact, with TensorRT or TensorRT for RTX: one builder for both."""

from propulsion_export.engine.builder import build_engine, onnx_digest
from propulsion_export.engine.options import BuildOptions
from propulsion_export.engine.profiles import parse_shapes

__all__ = ["BuildOptions", "build_engine", "onnx_digest", "parse_shapes"]
