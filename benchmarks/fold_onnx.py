"""The cost of an adapter folded into a switchable artifact, against a folded export of its own.

    python benchmarks/fold_onnx.py [--adapters 5] [--placement attention]

On SmolLM2-135M-Instruct, by onnxruntime-genai's builder, in float32. Prints the seconds of the
folded export, of the switchable one, and of each adapter with `--from`, alone and with `--share`;
and the bytes that each writes. Adapters are random. Nothing is compared with PyTorch.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from propulsion_export import export_onnx, fold_onnx
from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale

sys.path.insert(0, str(Path(__file__).parents[1] / "samples"))
from smollm2 import model_file

LAYERS, WIDTH, KEYS, INNER = 30, 576, 192, 1536
ATTENTION = {"q_proj": WIDTH, "k_proj": KEYS, "v_proj": KEYS, "o_proj": WIDTH}
MLP = {"gate_proj": INNER, "up_proj": INNER, "down_proj": WIDTH}


def widths(placement: str) -> dict[str, int]:
    """The output channels of the scaled modules by path."""
    parts = {"self_attn": ATTENTION} | ({"mlp": MLP} if placement == "all" else {})
    return {
        f"model.layers.{layer}.{part}.{name}": width
        for layer in range(LAYERS)
        for part, each in parts.items()
        for name, width in each.items()
    }


def write_adapter(directory: Path, placement: str, seed: int) -> Path:
    """A random adapter of the model."""
    chooser = np.random.default_rng(seed)
    scales = {
        path: Scale(chooser.uniform(0.9, 1.1, width)) for path, width in widths(placement).items()
    }
    directory.mkdir()
    Adapter(directory.name, scales, base=str(model_file())).write(directory)
    return directory


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def new_bytes(directory: Path) -> int:
    """Bytes of the files that no other directory shares."""
    files = [path.stat() for path in directory.rglob("*") if path.is_file()]
    return sum(file.st_size for file in files if file.st_nlink == 1)


def measure(place: Path, adapters: list[Path]) -> dict[str, float]:
    """Seconds and bytes of each way to a folded graph."""
    source, first = place / "switchable", adapters[0]
    found = {
        "folded export": timed(lambda: export_onnx([first], place / "own", exporter="genai")),
        "bytes of the folded export": new_bytes(place / "own"),
        "switchable export": timed(
            lambda: export_onnx(
                [], source, model=str(model_file()), mode="switchable", exporter="genai"
            )
        ),
    }
    for name, share in (("--from", False), ("--from --share", True)):
        one, many = place / f"one{share}", place / f"many{share}"
        found[f"one {name}"] = timed(
            lambda: fold_onnx([first], one, from_artifact=source, share=share)  # noqa: B023
        )
        all_of_them = timed(
            lambda: fold_onnx(adapters, many, from_artifact=source, share=share)  # noqa: B023
        )
        found[f"each of {len(adapters)} {name}"] = all_of_them / len(adapters)
        found[f"bytes of one {name}"] = new_bytes(one)
    return found


def main() -> None:
    """Measure and print, the last line as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=5)
    parser.add_argument("--placement", choices=["attention", "all"], default="attention")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        adapters = [
            write_adapter(place / f"adapter{seed}", options.placement, seed)
            for seed in range(options.adapters)
        ]
        found = measure(place, adapters)
    for name, value in found.items():
        shown = f"{value / 1e6:10.1f} MB" if name.startswith("bytes") else f"{value:10.1f} s"
        print(f"{name:40} {shown}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
