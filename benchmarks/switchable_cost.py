"""What scales as inputs cost in ONNX Runtime: base, folded and switchable graph, run in turn.

    python benchmarks/switchable_cost.py [--placement attention] [--batch 8] [--rounds 30]

Every round runs each graph once, so that a machine that slows down slows all of them; the figure is
the median over rounds of the ratio to the base model's graph in the same round. The adapters are
random: a scale costs the same whatever its value.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from propulsion_export import Adapter, Artifact, export_onnx
from propulsion_export.base import load_base
from propulsion_export.folding_rules import output_width
from propulsion_export.graph.dimensions import NameDimensions
from propulsion_export.graph.files import write_graph
from propulsion_export.graph.finishing import optimise
from propulsion_export.model_fingerprint import fingerprint_of_model
from propulsion_export.runners.graphs import onnxruntime_runner
from propulsion_export.sampling import input_names, trace_inputs
from propulsion_export.scales import Scale
from propulsion_export.trace import trace

sys.path.insert(0, str(Path(__file__).parent.parent / "samples"))
from minilm import model_directory

# A part of the module paths that each placement scales.
PLACEMENTS = {"all": "", "attention": "attention.self."}


def prepare(directory: Path, placement: str) -> dict[str, tuple[Path, dict]]:
    """Graph and extra feeds by name."""
    source = str(model_directory())
    model = load_base(source, task="feature-extraction").model
    chooser = np.random.default_rng(0)
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    scales = {
        path: Scale(chooser.uniform(0.9, 1.1, output_width(module)))
        for path, module in model.named_modules()
        if isinstance(module, kinds) and PLACEMENTS[placement] in path
    }
    adapter = Adapter("random", scales, task="feature-extraction")
    (directory / "adapter").mkdir()
    replace(adapter, base=source, fingerprint=fingerprint_of_model(model)).write(
        directory / "adapter"
    )
    for mode in ("folded", "switchable"):
        export_onnx([f"random={directory / 'adapter'}"], directory / mode, mode=mode)
    names = input_names(type(model), model.config)
    base = trace(model, trace_inputs(names, model.config))
    NameDimensions()(base)
    (directory / "base").mkdir()
    switchable = Artifact.read(directory / "switchable")
    return {
        "base": (write_graph(optimise(base), directory / "base"), {}),
        "folded": (directory / "folded" / "model.onnx", {}),
        "switchable, no adapter fed": (switchable.path, {}),
        "switchable, adapter fed": (switchable.path, dict(switchable.feeds("random"))),
    }


def measure(graphs: dict[str, tuple[Path, dict]], batch: int, length: int, rounds: int) -> dict:
    tokens = np.random.default_rng(1).integers(1000, 30000, (batch, length))
    inputs = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "token_type_ids": np.zeros_like(tokens),
    }
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
    parser.add_argument("--placement", choices=PLACEMENTS, default="all")
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
