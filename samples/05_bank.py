"""One loaded graph, a different adapter in every row, and an adapter added while it is loaded."""

import sys
from pathlib import Path

from propulsion_export import Session, export_onnx

first, second, output = map(Path, sys.argv[1:])  # two adapter directories, and where to write

export_onnx([f"first={first}", f"second={second}"], output, mode="bank")

session = Session(output)
text = "a large wild cat with stripes"

# One batch; the session looks each row's adapter up in the bank.
for reply in session([text] * 3, adapter=["first", "second", "base"]):
    print(reply.adapter, reply.prediction["label"], f"version {reply.version[7:15]}")

# No new trace, no reload; requests that are running keep the adapters they began with.
session.add(f"third={second}")
(reply,) = session(text, adapter="third")
print(reply.adapter, reply.prediction["label"], f"version {reply.version[7:15]}")
