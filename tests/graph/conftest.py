"""Tiny ONNX artifacts."""

from text_artifacts import artifact, folded, graph, switchable

__all__ = ["artifact", "folded", "graph", "switchable"]
