"""Write a failing run with a program that runs it again."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.parity.failing import FailingRun

FOLDER = "failing"
_PROGRAM = '''\
"""Run an artifact on the inputs on which `propulsion-export parity` found it wrong.

    python reproduce.py [ARTIFACT]

Prints every output's largest error, of the numbers that count, against what is allowed. Exit 0:
all are within, 1: the artifact is still wrong.

| file | holds |
|---|---|
| inputs.npz | the batch that the artifact reads |
| oracle.npz | what PyTorch computes of it in float64 with the adapter {adapter} |
| candidate.npz | what the artifact returned |
| counted.npz | where the oracle's numbers count: padding does not |
| adapter.safetensors | inputs of a random adapter, where the artifact has none of its own |
"""

import sys
from pathlib import Path

import numpy as np

from propulsion_export import Artifact, open_runner

HERE = Path(__file__).resolve().parent
ARTIFACT = {artifact!r}  # relative to this file
ADAPTER = {adapter!r}
ALLOWED = {allowed!r}


def main() -> int:
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / ARTIFACT
    run = open_runner(directory, {runner!r}, steps={steps!r}, in_float={in_float!r})
    found = run({{**read("inputs.npz"), **adapter_feeds(directory)}})
    oracle, counted = read("oracle.npz"), read("counted.npz")
    wrong = 0
    for name, allowed in ALLOWED.items():
        rows = counted[name].reshape(len(counted[name]), -1).any(axis=1)
        values, expected = found[name][rows].astype(np.float64), oracle[name][rows]
        ruled_out = expected == -np.inf  # tokens; no difference where both sides have it
        with np.errstate(invalid="ignore"):  # infinity minus infinity
            errors = np.where(ruled_out & (values == -np.inf), 0, np.abs(values - expected))
        masked = (oracle[name] == -np.inf).any()  # then padding may be minus infinity too
        harmless = values < np.inf if masked else np.isfinite(values)
        error = errors[counted[name][rows] | ~harmless].max(initial=0)
        passed = error <= allowed
        wrong += not passed
        verdict = "right" if passed else "WRONG"
        print(f"{{name}}: error {{error:.3g}}, allowed {{allowed:.3g}}: {{verdict}}")
    return 1 if wrong else 0


def adapter_feeds(directory: Path) -> dict:
    """The inputs that select the adapter."""
    if (HERE / "adapter.safetensors").exists():
        import ml_dtypes  # so that numpy has bfloat16
        from safetensors.numpy import load_file

        return load_file(HERE / "adapter.safetensors")
    return dict(Artifact.read(directory).feeds(ADAPTER)) if {fed!r} else {{}}


def read(name: str) -> dict:
    with np.load(HERE / name) as file:
        return dict(file)


if __name__ == "__main__":
    sys.exit(main())
'''


def write_failing_run(
    run: FailingRun, artifact: Artifact, runner: str, report: Path, *, final: Path
) -> None:
    """Write `failing/` with arrays and `reproduce.py` into the directory of a report.

    Args:
        run: what is kept.
        artifact: what was run.
        runner: the runtime, as in `runners.table`.
        report: the directory that is written to.
        final: where that directory will be; paths in the program are relative to it.
    """
    folder = report / FOLDER
    folder.mkdir()
    arrays = {
        "inputs": run.inputs,
        "oracle": run.oracle,
        "candidate": _storable(run.candidate),
        "counted": run.counted,
    }
    for name, values in arrays.items():
        by_name: dict[str, Any] = dict(values)
        np.savez_compressed(folder / f"{name}.npz", **by_name)
    if run.feeds:
        save_file(dict(run.feeds), folder / "adapter.safetensors")
    program = _PROGRAM.format(
        artifact=os.path.relpath(artifact.directory.resolve(), final.resolve() / FOLDER),
        adapter=run.adapter,
        allowed=dict(run.allowed),
        runner=runner,
        steps=run.steps,
        in_float=artifact.manifest.quantization is not None,
        fed=_is_fed(run, artifact),
    )
    (folder / "reproduce.py").write_text(program, encoding="utf-8")


def _is_fed(run: FailingRun, artifact: Artifact) -> bool:
    """Whether the adapter's inputs are fed; the base model is a switchable graph without them."""
    manifest = artifact.manifest
    bare = run.adapter == BASE_NAME and manifest.mode == "switchable" and manifest.kind == "onnx"
    return manifest.mode != "folded" and not bare


def _storable(arrays: Tensors) -> dict[str, Array]:
    """Numpy's files have no bfloat16; float32 holds every one of them."""
    return {
        name: values.astype(np.float32) if values.dtype.name == "bfloat16" else values
        for name, values in arrays.items()
    }
