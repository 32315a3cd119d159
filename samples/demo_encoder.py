"""The demo's first half: adapters of an encoder, merged, folded, switchable, a bank, an engine."""

import sys

from demo_steps import DATA, OUTPUT, Row, judge, step
from minilm import model_directory

REACHED = 0.82  # held-out accuracy that the topic adapter has to reach


def train(name: str, base: str) -> float:
    """Train an adapter; returns its held-out accuracy."""
    metrics = step(
        f"Train an adapter: {name}",
        *("train", "-m", base, "-d", f"{DATA}/{name}.train.jsonl"),
        *("--validation", f"{DATA}/{name}.held-out.jsonl", "-o", f"{OUTPUT}/adapters/{name}"),
    )
    print(
        f"{name}: held-out accuracy {metrics['validation_accuracy']:.1%}, "
        f"the head alone {metrics['head_only_accuracy']:.1%}"
    )
    return metrics["validation_accuracy"]


def encoder() -> list[Row]:
    """Every step of an encoder's adapters; returns the verdicts."""
    base = str(model_directory())
    adapters = f"{OUTPUT}/adapters"
    both = ("-a", f"topic={adapters}/topic", "-a", f"part-of-speech={adapters}/part-of-speech")

    reached = train("topic", base)
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
    if reached < REACHED:
        sys.exit(f"topic: {reached:.1%} held-out, expected {REACHED:.0%}")
    return [
        judge(name) for name in ("merged", "onnx-folded", "onnx-switchable", "onnx-bank", "engine")
    ]
