"""One ONNX graph, two adapters, fed by hand in ONNX Runtime, without this package at run time."""

import sys
from pathlib import Path

import onnxruntime
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from propulsion_export import export_onnx

first, second, output = map(Path, sys.argv[1:])  # two adapter directories, and where to write

export_onnx([f"first={first}", f"second={second}"], output, mode="switchable")

options = onnxruntime.SessionOptions()
options.log_severity_level = 3  # no warning about each optional input
session = onnxruntime.InferenceSession(output / "model.onnx", options)
tokenizer = AutoTokenizer.from_pretrained(output)
tokens = dict(tokenizer(["a large wild cat with stripes"], return_tensors="np"))

# Without any of the optional inputs the graph is the base model.
print("base  ", session.run(["logits"], tokens)[0].argmax())
for name in ("first", "second"):
    # An adapter's file holds the inputs to feed.
    feeds = load_file(output / "adapters" / f"{name}.safetensors")
    print(name, session.run(["logits"], tokens | feeds)[0].argmax())
