"""PyTorch's own error in units of what rounding explains: what CONSTANT in parity/own_error is.

    python benchmarks/own_error.py [--models DIRECTORY:TASK ...] [--dtypes float32 float16 bfloat16]

For every architecture of the tests' tiny models and every given checkpoint, as they are and with a
random adapter: the largest error over the inputs of a verdict at a precision, divided by
u * sqrt(n) * scale, where u is the unit roundoff, n how often layers add to the residual stream and
scale the largest value of the output; and the error as a share of the scale. One line for each
output, and the distribution by precision. Mixtures of experts are counted apart: where two experts
are nearly as good, rounding chooses between them, which is no matter of how it adds up.
"""

import argparse
import sys
from collections.abc import Iterator
from math import sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tiny_models import KINDS, TASKS, make_model, make_random_adapter

from kinds import DECODERS, ENCODER_DECODERS, EXPERTS
from propulsion_export.adapters.adapter import Adapter
from propulsion_export.base_model.loading import BaseModel, load_base
from propulsion_export.parity.comparison import UNIT_ROUNDOFF, compare
from propulsion_export.parity.inputs import make_batches
from propulsion_export.parity.oracle import compute_oracle
from propulsion_export.parity.own_error import additions_of

Row = tuple[str, str, float, float]


def tiny(seeds: int) -> Iterator[tuple[str, BaseModel, list[Adapter]]]:
    """Every tiny architecture and task with random adapters."""
    kinds = [(kind, task) for kind in KINDS for task in TASKS]
    kinds += [(kind, "text-generation") for kind in DECODERS]
    kinds += [(kind, "text2text-generation") for kind in ENCODER_DECODERS]
    for kind, task in kinds:
        for seed in range(seeds):
            generates = task in ("text-generation", "text2text-generation")
            model = make_model(kind, *(() if generates else (task,)), seed=seed)
            adapters = [make_random_adapter(model, seed + 1)]
            yield (
                f"{kind} {task}",
                BaseModel(model, "tiny", task, frozenset(), frozenset(), ()),
                adapters,
            )


def given(models: list[str]) -> Iterator[tuple[str, BaseModel, list[Adapter]]]:
    """Checkpoints as they are, and with a random adapter."""
    for each in models:
        directory, _, task = each.rpartition(":")
        base = load_base(directory, task=task)
        yield f"{Path(directory).name} {task}", base, [make_random_adapter(base.model, 1)]


def measure(name: str, base: BaseModel, adapters: list[Adapter], dtype: str) -> Iterator[Row]:
    """The ratio and the share of every output of every state."""
    manifest = SimpleNamespace(mode="switchable", dtype=dtype, kind="onnx", layout={})
    artifact: Any = SimpleNamespace(manifest=manifest, feeds=lambda name: {})
    batches = make_batches(base, None, 0, short=False)
    draft = lambda prompt, steps: (  # noqa: E731
        np.zeros((len(prompt["input_ids"]), steps), np.int64),
        np.ones((len(prompt["input_ids"]), steps)),
    )
    subjects = compute_oracle(
        artifact, base, adapters, batches, lambda *_: None, steps=4, draft=draft
    )
    unit = UNIT_ROUNDOFF[dtype] * sqrt(additions_of(base.model.config))
    for subject in subjects:
        for one in compare(batches, subject.oracle, subject.reference, subject.reference, dtype):
            share = one.reference_error / one.scale
            yield f"{name} {subject.name} {one.output}", dtype, share / unit, share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "float16", "bfloat16"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--no-tiny", action="store_true")
    options = parser.parse_args()
    rows: list[Row] = []
    for dtype in options.dtypes:
        subjects = [] if options.no_tiny else [*tiny(options.seeds)]
        for name, base, adapters in [*subjects, *given(options.models)]:
            for row in measure(name, base, adapters, dtype):
                rows.append(row)
                print(f"{row[0]:70} {row[1]:9} ratio {row[2]:8.2f}  share {row[3]:.2e}", flush=True)
    for dtype in options.dtypes:
        for experts in (False, True):
            show(dtype, experts, [row for row in rows if is_row_of(row, dtype, experts)])


def is_row_of(row: Row, dtype: str, experts: bool) -> bool:
    """Whether a row is of a precision, and of a mixture of experts or of another model."""
    return row[1] == dtype and experts == row[0].startswith(EXPERTS)


def show(dtype: str, experts: bool, rows: list[Row]) -> None:
    """Print the distribution of the ratios."""
    if not rows:
        return
    ratios, shares = (np.array([row[place] for row in rows]) for place in (2, 3))
    middle, most = np.percentile(ratios, [50, 99])
    print(
        f"{dtype}{', experts' if experts else ''}: {len(ratios)} outputs; ratio: median "
        f"{middle:.2f}, 99 % {most:.2f}, largest {ratios.max():.2f}; share of the scale: largest "
        f"{shares.max():.2e}"
    )


if __name__ == "__main__":
    main()
