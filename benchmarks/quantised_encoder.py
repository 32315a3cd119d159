"""int4 and int8 weights of a real encoder under an adapter trained in float32.

    python benchmarks/quantised_encoder.py [--adapter DIR] [--only "int4, qdq"]

Trains the demo's topic adapter on all-MiniLM-L6-v2 (or takes one that is trained), exports it
folded and switchable over the float32 base and over quantised ones, and prints for each the
accuracy on the held-out texts, the size of the graph's weights, and the time of a batch as a ratio
to float32. Ends with 1 if an int4 or int8 base costs the adapter more than two points.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from prepared import bert_inputs
from propulsion_export import Artifact, Session, export_onnx, train
from propulsion_export.runners.onnxruntime import onnxruntime_runner
from propulsion_export.training.options import TrainOptions

sys.path.insert(0, str(Path(__file__).parent.parent / "samples"))
from minilm import model_directory

DATA = Path(__file__).parent.parent / "samples" / "data"
MOST_LOST = 0.02
BASES = {
    "float32": {},
    "int8, matmulnbits": {"quantize": "int8"},
    "int4, matmulnbits": {"quantize": "int4"},
    "int4, matmulnbits, level 1": {"quantize": "int4", "accuracy_level": 1},
    "int8, qdq": {"quantize": "int8", "quantization_form": "qdq"},
    "int4, qdq": {"quantize": "int4", "quantization_form": "qdq"},
    "int8 weights and activations": {
        "quantize": "int8", "quantization_form": "qdq", "quantize_activations": True,
    },
}  # fmt: skip


def read_rows(file: Path) -> tuple[list[str], list[str]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def train_adapter(directory: Path) -> Path:
    options = TrainOptions(validation=str(DATA / "topic.held-out.jsonl"), head_only=False)
    train(str(model_directory()), str(DATA / "topic.train.jsonl"), directory, options=options)
    return directory


def calibration_texts(directory: Path) -> Path:
    texts, _ = read_rows(DATA / "topic.train.jsonl")
    file = directory / "calibration.txt"
    file.write_text("\n".join(texts[:128]) + "\n")
    return file


def accuracy_of(directory: Path, adapter: str | None) -> float:
    texts, labels = read_rows(DATA / "topic.held-out.jsonl")
    replies = Session(directory)(texts, adapter=adapter)
    right = [
        reply.prediction["label"] == label for reply, label in zip(replies, labels, strict=True)
    ]
    return sum(right) / len(right)


def times_of(graphs: dict[str, Path], rounds: int) -> dict[str, float]:
    """Each graph once a round; the median of the ratios to float32 in the same round."""
    runs = {name: onnxruntime_runner(path) for name, path in graphs.items()}
    inputs = bert_inputs(8, 64)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):
        for name, run in runs.items():
            started = time.perf_counter()
            run(inputs)
            seconds[name].append(time.perf_counter() - started)
    return {
        name: statistics.median(
            taken / float32
            for taken, float32 in zip(times[2:], seconds["float32"][2:], strict=True)
        )
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, help="a trained topic adapter")
    parser.add_argument("--only", action="append", choices=BASES, help="bases beside float32")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        adapter = arguments.adapter or train_adapter(root / "topic")
        texts = calibration_texts(root)
        found, graphs = {}, {}
        wanted = {"float32", *(arguments.only or BASES)}
        for name, options in ((name, BASES[name]) for name in BASES if name in wanted):
            calibration = texts if options.get("quantize_activations") else None
            for mode in ("folded", "switchable"):
                export_onnx(
                    [f"topic={adapter}"], root / name / mode, mode=mode, calibration=calibration,
                    **options,
                )  # fmt: skip
            graphs[name] = Artifact.read(root / name / "folded").path
            found[name] = [
                accuracy_of(root / name / "folded", None),
                accuracy_of(root / name / "switchable", "topic"),
                sum(file.stat().st_size for file in graphs[name].parent.glob("model.onnx*")),
            ]
            print(name, found[name], flush=True)
        times = times_of(graphs, arguments.rounds)
    print(f"{'base':30} folded  switchable     MB   time")
    for name, (folded, switchable, size) in found.items():
        print(f"{name:30} {folded:6.1%} {switchable:11.1%} {size / 1e6:6.1f} {times[name]:6.2f}")
    best = found["float32"][0]
    lost = {name: best - min(values[:2]) for name, values in found.items()}
    print(f"most lost: {max(lost.values()):.2%}, at most {MOST_LOST:.0%} expected")
    sys.exit(max(lost.values()) > MOST_LOST)


if __name__ == "__main__":
    main()
