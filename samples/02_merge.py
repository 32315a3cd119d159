"""An adapter becomes a checkpoint that plain transformers loads."""

import sys
from pathlib import Path

from transformers import pipeline

from propulsion_export import check_parity, merge

adapter, output = map(Path, sys.argv[1:])  # an adapter directory, and where to write

merge(adapter, output)

classify = pipeline("text-classification", model=str(output))
for text in ("a large wild cat with stripes", "the capital of a country"):
    print(text, "->", classify(text)[0])

report = check_parity(output)
print(f"parity: {report.verdict}, {report.margin:.0%} of the allowed error left")
assert report.passed
