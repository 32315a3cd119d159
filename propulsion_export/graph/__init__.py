"""The ONNX graph: traced, changed by passes, written, read, compared with a manifest."""
