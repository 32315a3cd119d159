"""A pytest plugin: the fixture `assert_parity` fails a test whose artifact fails its verdict.

pytest loads it wherever the package is installed. Nothing heavy is imported before a test calls the
fixture.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

if TYPE_CHECKING:
    from propulsion_export.parity.reports.report import ParityReport

_TOLD = 20  # failed checks in a message


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the command line."""
    group = parser.getgroup("propulsion-export")
    group.addoption(
        "--parity-report",
        metavar="DIR",
        help="write parity.json and parity.html of each assert_parity to a directory in DIR",
    )
    group.addoption(
        "--parity-must-run",
        action="store_true",
        help="fail a test, instead of skipping it, where assert_parity could run nothing",
    )


class AssertParity:
    """What the fixture `assert_parity` returns: call it with an artifact's directory."""

    def __init__(self, test: str, reports: Path | None, *, must_run: bool) -> None:
        self._test, self._reports, self._must_run, self._calls = test, reports, must_run, 0

    def __call__(
        self,
        artifact: str | Path,
        *,
        model: str | None = None,
        adapter: Sequence[str | Path] = (),
        against: Sequence[str | Path] = (),
        runner: str = "auto",
        inputs: str | Path | None = None,
        seed: int | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        low_memory: bool = False,
        max_kl: float | None = None,
        effort: Literal["quick", "standard", "thorough"] = "standard",
        bisect: bool = False,
        trust_remote_code: bool = False,
    ) -> "ParityReport":
        """Compare an artifact with PyTorch; return the report if every check holds.

        The test fails if a check does not hold, and is skipped if nothing could be run on this
        machine (with `--parity-must-run` it fails then, too).

        Args:
            artifact: directory of a merged checkpoint, an ONNX export or an engine.
            model: where the base model is now; default: where it was when the artifact was made.
            adapter: where adapters are now, `NAME=DIR`; default: where they were.
            against: other artifacts of the same base model to compare with.
            runner: the runtime; `auto`: the default for its kind and dtype.
            inputs: file of texts to compare on; default: random tokens.
            seed: for the random tokens and adapters; default: 0.
            device: where PyTorch computes; `auto`: a GPU with room for the model if there is one.
            low_memory: let PyTorch compute with one layer of the model in memory at a time.
            max_kl: the most that quantised weights may cost, in nats; default: any.
            effort: how many inputs to compare on, as `--quick` and `--thorough` say it.
            bisect: find the first module that is wrong; the message names it.
            trust_remote_code: run code that the base model brings.

        Raises:
            PropulsionExportError: an input is damaged, missing or does not belong to the others.
        """
        __tracebackhide__ = True
        from propulsion_export.errors import UnavailableError
        from propulsion_export.pipeline.parity import check_parity

        report = self._place()
        try:
            verdict = check_parity(
                Path(artifact),
                model=model,
                adapter=adapter,
                against=[Path(each) for each in against],
                runner=runner,
                inputs=None if inputs is None else Path(inputs),
                seed=seed,
                report=report,
                force=report is not None,
                device=device,
                low_memory=low_memory,
                max_kl=max_kl,
                effort=effort,
                bisect=bisect,
                trust_remote_code=trust_remote_code,
            )
        except UnavailableError as error:
            return self._not_run(f"parity: not run ({error})")
        if verdict.verdict == "not run":
            return self._not_run(_message(verdict, report))
        if not verdict.passed:
            pytest.fail(_message(verdict, report), pytrace=False)
        return verdict

    def _place(self) -> Path | None:
        """Where this call's report goes: a directory named by the test and the call."""
        self._calls += 1
        if self._reports is None:
            return None
        name = re.sub(r"[^\w.-]+", "-", self._test)
        return self._reports / (name if self._calls == 1 else f"{name}-{self._calls}")

    def _not_run(self, message: str) -> "ParityReport":
        __tracebackhide__ = True
        if self._must_run:
            pytest.fail(message, pytrace=False)
        pytest.skip(message)


@pytest.fixture
def assert_parity(request: pytest.FixtureRequest) -> AssertParity:
    """Call it with an artifact's directory: the test passes only if the artifact's verdict does."""
    directory = request.config.getoption("--parity-report")
    return AssertParity(
        request.node.nodeid,
        Path(directory) if directory else None,
        must_run=request.config.getoption("--parity-must-run"),
    )


def _message(verdict: "ParityReport", report: Path | None) -> str:
    """The verdict's line, the failed checks, and where the report is."""
    from propulsion_export.parity.reports.line import verdict_line

    failed = [check for check in verdict.checks if not check.passed]
    lines = [f"{verdict.artifact}: {verdict_line(verdict)}"]
    lines += [f"  {check.case} of {check.adapter}: {check.detail}" for check in failed[:_TOLD]]
    if len(failed) > _TOLD:
        lines.append(f"  and {len(failed) - _TOLD} more")
    lines += [f"  bisect: {line}" for found in verdict.located for line in found.lines()]
    if report is not None:
        lines.append(f"report: {report / 'parity.html'}")
    return "\n".join(lines)
