"""The cost of scales as inputs in ONNX Runtime: base, folded and switchable graph, in turn.

    python benchmarks/switchable_cost.py [--placement attention] [--batch 8] [--rounds 30]

Every round runs each graph once, so that a slower machine affects all alike; the figure is the
median over rounds of the ratio to the base model's graph in the same round.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from prepared import (
    BERT_PLACEMENTS,
    bert_inputs,
    export_base,
    export_modes,
    write_random_adapter,
)
from propulsion_export import Artifact
from propulsion_export.base_model.loading import load_base
from propulsion_export.runners.onnxruntime import onnxruntime_runner

sys.path.insert(0, str(Path(__file__).parent.parent / "samples"))
from minilm import model_directory

TASK = "feature-extraction"


def prepare(directory: Path, placement: str) -> dict[str, tuple[Path, dict]]:
    """The graphs and their extra feeds, by name."""
    source = model_directory()
    model = load_base(str(source), task=TASK).model
    part = BERT_PLACEMENTS[placement]
    write_random_adapter(model, directory / "adapter", part, base=source, task=TASK)
    export_modes(directory, ("folded", "switchable"))
    switchable = Artifact.read(directory / "switchable")
    return {
        "base": (export_base(model, directory / "base"), {}),
        "folded": (directory / "folded" / "model.onnx", {}),
        "switchable, no adapter fed": (switchable.path, {}),
        "switchable, adapter fed": (switchable.path, dict(switchable.feeds("random"))),
    }


def measure(graphs: dict[str, tuple[Path, dict]], batch: int, length: int, rounds: int) -> dict:
    inputs = bert_inputs(batch, length)
    runs = {name: (onnxruntime_runner(path), feeds) for name, (path, feeds) in graphs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 3):
        for name, (run, feeds) in runs.items():
            started = time.perf_counter()
            run(inputs | feeds)
            seconds[name].append(time.perf_counter() - started)
    ratios = {
        name: [taken / base for taken, base in zip(times, seconds["base"], strict=True)][3:]
        for name, times in seconds.items()
    }
    return {
        name: {
            "median ratio to base": round(statistics.median(values), 3),
            "quartiles": [round(cut, 3) for cut in statistics.quantiles(values)[::2]],
        }
        for name, values in ratios.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--placement", choices=BERT_PLACEMENTS, default="all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        graphs = prepare(Path(directory), options.placement)
        result = measure(graphs, options.batch, options.length, options.rounds)
    print(json.dumps(vars(options) | result, indent=2))


if __name__ == "__main__":
    main()
