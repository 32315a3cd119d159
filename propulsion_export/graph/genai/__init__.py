"""Graphs of onnxruntime-genai's model builder, with the scales of adapters in them."""
