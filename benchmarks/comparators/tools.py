"""The comparators, each called the way its own documentation calls it, at its own tolerances."""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from subjects import Subject, reference_runs

from propulsion_export.cli import main as propulsion_export

HERE = Path(__file__).parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Outcome:
    """What a comparator says of a graph.

    Attributes:
        agrees: whether it calls the graph right; None where it does not apply, see `said`.
        code: its exit code; None where there is none.
        said: what it says, in one line.
    """

    agrees: bool | None
    code: int | None
    said: str = ""


class EnvironmentMissingError(Exception):
    """A comparator cannot be installed; the message says why, in one line."""


def make_environment(name: str, work: Path) -> Path:
    """Install requirements-NAME.txt into an environment of its own; returns its `bin`.

    Raises:
        EnvironmentMissingError: pip cannot install it.
    """
    directory = work / "environments" / name
    if not (directory / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        pip = [str(directory / "bin" / "pip"), "install", "--quiet", "--requirement"]
        requirements = HERE / f"requirements-{name}.txt"
        tried = subprocess.run(
            [*pip, str(requirements)], capture_output=True, text=True, check=False
        )
        if tried.returncode:
            raise EnvironmentMissingError(_last_line(tried.stderr))
        (directory / "ready").touch()
    return directory / "bin"


class Ours:
    """`propulsion-export parity`."""

    name = "propulsion-export"

    def judge(self, subject: Subject, graphs: Sequence[Path], work: Path) -> Iterator[Outcome]:
        for graph in graphs:
            code, said = 0, io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                try:
                    propulsion_export(["parity", str(graph)])
                except SystemExit as ended:
                    code = ended.code if isinstance(ended.code, int) else 1
            failed = [line for line in said.getvalue().splitlines() if "FAILED" in line]
            yield Outcome(code == 0, code, failed[0] if failed else _last_line(said.getvalue()))


class Polygraphy:
    """`polygraphy run --onnxrt`, against PyTorch's outputs of inputs that we have drawn."""

    name = "Polygraphy"

    def judge(self, subject: Subject, graphs: Sequence[Path], work: Path) -> Iterator[Outcome]:
        binaries = make_environment("polygraphy", work)
        runs = subject.root / "runs"
        runs.mkdir(exist_ok=True)
        for number, (inputs, outputs) in enumerate(reference_runs(subject)):
            np.savez(runs / f"{number}.inputs.npz", **inputs)
            np.savez(runs / f"{number}.outputs.npz", **outputs)
        files = [str(runs / "inputs.json"), str(runs / "outputs.json")]
        made = [str(binaries / "python"), str(HERE / "in_polygraphy.py"), str(runs), *files]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
        for graph in graphs:
            ended = subprocess.run(
                [
                    *(str(binaries / "polygraphy"), "run", str(graph / "model.onnx")),
                    *("--onnxrt", "--validate"),
                    *("--load-inputs", files[0], "--load-outputs", files[1]),
                ],
                capture_output=True,
                text=True,
                check=False,
                env=os.environ | OFFLINE,
            )
            said = [line for line in ended.stdout.splitlines() if "FAILED" in line]
            yield Outcome(
                ended.returncode == 0,
                ended.returncode,
                said[-1] if said else _last_line(ended.stdout + ended.stderr),
            )


class Optimum:
    """The validation at the end of `optimum-cli export onnx`."""

    name = "optimum-onnx"

    def judge(self, subject: Subject, graphs: Sequence[Path], work: Path) -> Iterator[Outcome]:
        arguments = [subject.kind, subject.dtype, str(subject.root / "merged")]
        for told in ask("optimum", [*arguments, str(subject.root / "optimum")], graphs, work):
            agrees = not told["said"] if told["validated"] else None
            yield Outcome(agrees, told["code"], told["said"])


class Olive:
    """`olive run` with the pass OnnxDiscrepancyCheck; it takes causal language models alone."""

    name = "Olive"

    def judge(self, subject: Subject, graphs: Sequence[Path], work: Path) -> Iterator[Outcome]:
        if subject.kind != "decoder":
            raise EnvironmentMissingError("OnnxDiscrepancyCheck takes causal language models only")
        arguments = [str(subject.root / "merged"), str(subject.root / "olive")]
        for told in ask("olive", arguments, graphs, work):
            agrees = not told["failed"] if told["compared"] else None
            yield Outcome(agrees, told["code"], told["said"])


def ask(name: str, arguments: list[str], graphs: Sequence[Path], work: Path) -> list[dict]:
    """What in_NAME.py answers for every graph, in the environment of that name."""
    python = make_environment(name, work) / "python"
    ended = subprocess.run(
        [str(python), str(HERE / f"in_{name}.py"), *arguments],
        input="\n".join(map(str, graphs)),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | OFFLINE,
    )
    lines = [line for line in ended.stdout.splitlines() if line.startswith('{"code"')]
    if len(lines) != len(graphs):
        raise EnvironmentMissingError(_last_line(ended.stderr))
    return [json.loads(line) for line in lines]


TOOLS = (Ours(), Polygraphy(), Optimum(), Olive())


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
