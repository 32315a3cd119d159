"""ONNX artifact to engine artifact, with TensorRT or TensorRT for RTX: one builder for both."""

from propulsion_export.engine.builder import onnx_digest, write_engine
from propulsion_export.engine.options import BuildOptions
from propulsion_export.engine.profiles import parse_shapes

__all__ = ["BuildOptions", "onnx_digest", "parse_shapes", "write_engine"]
