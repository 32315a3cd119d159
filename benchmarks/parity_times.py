"""The time and memory of `propulsion-export parity`, beside PyTorch's own forward pass.

    python benchmarks/parity_times.py [DIR ...] [--rounds 3] [--json FILE] [--before FILE]
    python benchmarks/parity_times.py DIR --option=--low-memory

Each DIR is an artifact; without any, those that `make demo` leaves in demo-output. Every round
runs, each in a process of its own, PyTorch's forward pass of the inputs that the verdict compares
on, in the artifact's float dtype, and the command: without an option for its effort, and with
`--quick` and `--thorough` if it has these. The forward pass is timed in its process behind one that
does not count, without loading the model; the command is timed from its start to its end.

A ratio is the median over the rounds of the command's seconds over those of the forward pass in the
same round, so that another machine, or one that is busy, gives about the same. `peak` is the most
memory that the command's process holds at a time, files that it maps included. `--json` writes what
was measured; `--before` names such a file, and its ratios are shown beside the new ones.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

DEMO = Path(__file__).parents[1] / "demo-output"
DEMO_ARTIFACTS = (
    "merged",
    "onnx-folded",
    "onnx-switchable",
    "onnx-bank",
    "engine",
    "chat-float32",
    "chat-int4",
)
EFFORTS = ("--quick", "", "--thorough")
VERDICTS = {0: "passed", 1: "failed", 3: "not run"}
COMMAND = (str(Path(sys.executable).with_name("propulsion-export")), "parity")
HIDE_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Taken:
    """What a process or a forward pass has used: seconds, and bytes of memory at its peak."""

    wall: float
    cpu: float
    peak: int = 0


@dataclass(frozen=True)
class Row:
    """An artifact at one level of effort: medians over the rounds."""

    artifact: str
    effort: str
    verdict: str
    wall: float
    cpu: float
    wall_ratio: float
    cpu_ratio: float
    peak: int


def main() -> None:
    if sys.argv[1:2] == ["forward"]:
        print(json.dumps(asdict(forward(Path(sys.argv[2])))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifact", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--option", action="append", default=[], help="for the command; repeatable")
    parser.add_argument("--json", type=Path, help="file to write what was measured to")
    parser.add_argument("--before", type=Path, help="file that --json has written")
    options = parser.parse_args()
    efforts = [effort for effort in EFFORTS if effort in parity_help()]
    rows = [
        row
        for artifact in options.artifact or demo_artifacts()
        for row in measure(artifact, efforts, options.option, options.rounds)
    ]
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    before = json.loads(options.before.read_text()) if options.before else []
    print(table(rows, {(one["artifact"], one["effort"]): one for one in before}))


def demo_artifacts() -> list[Path]:
    found = [DEMO / name for name in DEMO_ARTIFACTS if (DEMO / name).is_dir()]
    if not found:
        sys.exit(f"{DEMO}: holds no artifact. Run `make demo`, or name artifacts.")
    return found


def parity_help() -> str:
    asked = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
    return asked.stdout


def measure(
    artifact: Path, efforts: Sequence[str], options: Sequence[str], rounds: int
) -> list[Row]:
    """One row for each effort; every round times all of them and one forward pass."""
    own: list[Taken] = []
    judged: dict[str, list[tuple[int, Taken]]] = {effort: [] for effort in efforts}
    for _ in range(rounds):
        own.append(forward_in_a_process(artifact))
        for effort, taken in judged.items():
            taken.append(judge(artifact, [*filter(None, [effort]), *options]))
    return [row_of(artifact.name, effort, taken, own) for effort, taken in judged.items()]


def row_of(
    artifact: str, effort: str, judged: Sequence[tuple[int, Taken]], own: Sequence[Taken]
) -> Row:
    codes, taken = {code for code, _ in judged}, [one for _, one in judged]
    pairs = list(zip(taken, own, strict=True))
    return Row(
        artifact,
        effort or "default",
        " and ".join(VERDICTS.get(code, f"exit code {code}") for code in sorted(codes)),
        wall=statistics.median(one.wall for one in taken),
        cpu=statistics.median(one.cpu for one in taken),
        wall_ratio=statistics.median(one.wall / forward.wall for one, forward in pairs),
        cpu_ratio=statistics.median(one.cpu / forward.cpu for one, forward in pairs),
        peak=max(one.peak for one in taken),
    )


def judge(artifact: Path, options: Sequence[str]) -> tuple[int, Taken]:
    """The exit code of the command, and what its process has used."""
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            [*COMMAND, str(artifact), *options],
            stdout=output,
            stderr=output,
            env=os.environ | HIDE_GPU,
        )
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    # Linux counts in KiB, macOS in bytes.
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return process.returncode, Taken(wall, used.ru_utime + used.ru_stime, peak)


def forward_in_a_process(artifact: Path) -> Taken:
    asked = subprocess.run(
        [sys.executable, __file__, "forward", str(artifact)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | HIDE_GPU,
    )
    return Taken(**json.loads(asked.stdout.splitlines()[-1]))


def forward(directory: Path) -> Taken:
    """Seconds of the base model's forward pass of the verdict's inputs, in this process."""
    import torch

    from propulsion_export.adapters.specification import read_adapters
    from propulsion_export.artifacts.artifact import Artifact
    from propulsion_export.parity.inputs import load_recorded_base, make_batches

    artifact = Artifact.read(directory)
    entries = artifact.list_adapters()
    adapters = read_adapters([f"{name}={entry.source}" for name, entry in entries.items()])
    base = load_recorded_base(artifact, adapters, None)
    model = base.model.eval().to(getattr(torch, artifact.manifest.dtype))
    batches = [
        {name: torch.from_numpy(values.copy()) for name, values in batch.items()}
        for batch in make_batches(base, None, 0, short=False, directory=directory)
    ]
    taken = Taken(0, 0)
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            for batch in batches:
                model(**batch)
        taken = Taken(time.perf_counter() - wall, time.process_time() - cpu)
    return taken


def table(rows: Sequence[Row], before: dict[tuple[str, str], dict[str, float]]) -> str:
    lines = [
        "| artifact | effort | verdict | wall, CPU seconds | over a forward pass: wall, CPU "
        "| before | peak, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        old = before.get((row.artifact, row.effort)) or before.get((row.artifact, "default"))
        earlier = f"{old['wall_ratio']:.0f}, {old['cpu_ratio']:.0f}" if old else ""
        lines.append(
            f"| {row.artifact} | {row.effort} | {row.verdict} | {row.wall:.1f}, {row.cpu:.1f} "
            f"| {row.wall_ratio:.0f}, {row.cpu_ratio:.0f} | {earlier} | {row.peak / 1e6:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
