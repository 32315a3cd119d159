"""The time and memory of `propulsion-export parity`, beside PyTorch's own forward pass.

    python benchmarks/parity_times.py [DIR ...] [--rounds 1] [--thorough] [--limit 300]
        [--json FILE] [--before REVISION]
    python benchmarks/parity_times.py DIR --option=--low-memory

Each DIR is an artifact; without any, those that `make demo` leaves in demo-output. Every round
runs, each in a process of its own, PyTorch's forward pass of the inputs that the verdict compares
on, in the artifact's float dtype, and the command: without an option for its effort, with
`--quick`, and with `--thorough` if asked. The forward pass is timed in its process behind one that
does not count, without loading the model; the command is timed from its start to its end, and
stopped after `--limit` seconds, which the verdict then says.

`--before` names a revision of this repository, such as BEFORE, the last one before verdicts were
made to cost less: its command judges the same artifacts in the same rounds, with the packages that
are installed here. It is given a copy of each, of hard links, whose manifest has no `digest`, which
older readers do not know; what else they cannot read, the verdict says by its exit code.

A ratio is the median over the rounds of the command's seconds over those of the forward pass in the
same round, so that another machine, or one that is busy, gives about the same. `peak` is the most
memory that the command's process holds at a time, files that it maps included. Without `--before`
and `--thorough` all of it takes less than 10 minutes on two cores that are free.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
VERDICTS = {0: "passed", 1: "failed", 3: "not run", -signal.SIGKILL: "stopped at the limit"}
BEFORE = "dd31eb4^1"
HIDE_GPU = {"CUDA_VISIBLE_DEVICES": ""}
REPOSITORY = Path(__file__).parents[1]
PROGRAM = "import cli; cli.main()"  # of the sources that PYTHONPATH names


@dataclass(frozen=True)
class Command:
    """The command `parity` of the sources in a directory; killed after `limit` seconds."""

    sources: Path
    limit: float

    def judge(self, artifact: Path, options: Sequence[str]) -> tuple[int, "Taken"]:
        """Its exit code, and what its process has used."""
        arguments = [sys.executable, "-P", "-c", PROGRAM, "parity", str(artifact), *options]
        with tempfile.TemporaryFile() as output:
            started = time.perf_counter()
            process = subprocess.Popen(
                arguments,
                stdout=output,
                stderr=output,
                env=os.environ | HIDE_GPU | {"PYTHONPATH": str(self.sources)},
            )
            ending = threading.Timer(self.limit, process.kill)
            ending.start()
            _, status, used = os.wait4(process.pid, 0)
            wall = time.perf_counter() - started
            ending.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        # Linux counts in KiB, macOS in bytes.
        peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return process.returncode, Taken(wall, used.ru_utime + used.ru_stime, peak)


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
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--thorough", action="store_true", help="measure --thorough too")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one verdict")
    parser.add_argument("--option", action="append", default=[], help="for the command; repeatable")
    parser.add_argument("--json", type=Path, help="file to write what was measured to")
    parser.add_argument("--before", help=f"revision to measure too, such as {BEFORE}")
    options = parser.parse_args()
    ways = {effort: [effort, *options.option] for effort in ("--quick", "")}
    if options.thorough:
        ways["--thorough"] = ["--thorough", *options.option]
    artifacts = options.artifact or demo_artifacts()
    now = Command(REPOSITORY, options.limit)
    rows: list[Row] = []
    with earlier(options.before, options.limit) as before:
        for artifact in artifacts:
            rows += measure(artifact, now, ways, before, options.rounds)
            print(f"{artifact.name}: {rows[-1].verdict}", file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    print(table(rows))


@contextmanager
def earlier(revision: str | None, limit: float) -> Iterator[Command | None]:
    """The command of another revision, checked out while it is needed."""
    if revision is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as name:
        sources = Path(name) / "sources"
        git("worktree", "add", "--detach", str(sources), revision)
        try:
            yield Command(sources, limit)
        finally:
            git("worktree", "remove", "--force", str(sources))


@contextmanager
def without_digest(artifact: Path) -> Iterator[Path]:
    """A copy of an artifact whose manifest older readers know."""
    with tempfile.TemporaryDirectory(dir=artifact.parent) as name:
        copy = Path(name) / artifact.name
        shutil.copytree(artifact, copy, copy_function=os.link)
        file = copy / "propulsion.json"
        manifest = json.loads(file.read_text())
        file.unlink()  # of the artifact that it is linked with, nothing changes
        file.write_text(json.dumps({k: v for k, v in manifest.items() if k != "digest"}))
        yield copy


def git(*arguments: str) -> None:
    subprocess.run(["git", "-C", str(REPOSITORY), *arguments], check=True, stdout=sys.stderr)


def demo_artifacts() -> list[Path]:
    found = [DEMO / name for name in DEMO_ARTIFACTS if (DEMO / name).is_dir()]
    if not found:
        sys.exit(f"{DEMO}: holds no artifact. Run `make demo`, or name artifacts.")
    return found


def measure(
    artifact: Path,
    now: Command,
    ways: Mapping[str, Sequence[str]],
    before: Command | None,
    rounds: int,
) -> list[Row]:
    """One row for each effort, and one of before; every round times all and one forward pass."""
    own: list[Taken] = []
    judged: dict[str, list[tuple[int, Taken]]] = {effort: [] for effort in ways}
    if before is not None:
        judged["before"] = []
    for _ in range(rounds):
        own.append(forward_in_a_process(artifact))
        for effort, options in ways.items():
            judged[effort].append(now.judge(artifact, [*filter(None, options)]))
        if before is not None:
            with without_digest(artifact) as copy:
                judged["before"].append(before.judge(copy, ways[""][1:]))
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


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| artifact | effort | verdict | wall, CPU seconds | over a forward pass: wall, CPU "
        "| peak, MB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.artifact} | {row.effort} | {row.verdict} | {row.wall:.1f}, {row.cpu:.1f} "
        f"| {row.wall_ratio:.0f}, {row.cpu_ratio:.0f} | {row.peak / 1e6:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
