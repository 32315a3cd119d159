"""The verdict of a parity run, and its JSON form."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from propulsion_export.environment.json_text import to_json
from propulsion_export.parity.comparison import DECADES, FACTOR, OutputErrors
from propulsion_export.parity.reports.located import Located

SCHEMA_VERSION = 1
Verdict = Literal["passed", "failed", "not run"]
Case = Literal[
    "parity",
    "effect",
    "switching",
    "padding",
    "labels",
    "recomputing",
    "right padding",
    "padding inside",
    "greedy",
    "mixed",
    "sample",
    "pooling",
    "weights",
    "shipped parity",
    "shipped effect",
    "price",
    "PyTorch",
    "inputs",
    "tables",
    "texts",
    "settings",
    "identity",
    "added",
    "against",
]


@dataclass(frozen=True)
class Check:
    """One thing that was compared.

    Attributes:
        case: what was compared, see `parity.cases` and `parity.generation`.
        adapter: name of the adapter it was done with; `base` for none.
        passed: whether it holds.
        detail: one line: what was found against what was allowed.
        outputs: the errors behind it, output by output.
        effect_over_error: how many times the error the effect of the scales is; None where the
            check has no effect.
    """

    case: Case
    adapter: str
    passed: bool
    detail: str
    outputs: tuple[OutputErrors, ...] = ()
    effect_over_error: float | None = None


@dataclass(frozen=True)
class Coverage:
    """One kind of input or output, and whether the verdict has looked at it.

    Attributes:
        what: such as `rows of the longest length`.
        covered: whether it was compared.
        detail: how, with numbers; or why not, and the option that would.
    """

    what: str
    covered: bool
    detail: str


@dataclass(frozen=True)
class NotRun:
    """Something that could not be compared on this machine, and why."""

    what: str
    reason: str


@dataclass(frozen=True)
class Rounding:
    """How far a runtime's rounding of the inputs of quantised layers moves an output.

    Attributes:
        adapter: the state it was measured on: `base`, or an adapter.
        output: its name.
        error: distance of the graph as shipped from the oracle, root mean square.
        exact: the same of the graph in floating point; None where the runtime cannot compute so.
        scale: largest absolute value of the oracle's output.
    """

    adapter: str
    output: str
    error: float
    exact: float | None
    scale: float

    def __str__(self) -> str:
        share = self.error / self.scale if self.scale else 0.0
        exact = "" if self.exact is None else f", {self.exact:.3g} in floating point"
        return f"{self.output} of {self.adapter} off by {self.error:.3g} ({share:.2%}){exact}"


@dataclass(frozen=True)
class Price:
    """How far the quantised model is from the unquantised one with the same adapter.

    Of each pair of distributions the first is the unquantised model's. What does not apply to the
    task is None.

    Attributes:
        adapter: name of the adapter; `base` for none.
        output: its name.
        compared: how many distributions or vectors.
        kl: mean Kullback-Leibler divergence, in nats.
        kl_largest: the largest one.
        agreement: the share of distributions whose likeliest entry is the same.
        cosine_distance: mean of 1 - cosine of two vectors.
        difference: mean absolute difference of two numbers.
        perplexity: of the given texts, quantised.
        unquantised_perplexity: of the given texts, unquantised.
    """

    adapter: str
    output: str
    compared: int
    kl: float | None = None
    kl_largest: float | None = None
    agreement: float | None = None
    cosine_distance: float | None = None
    difference: float | None = None
    perplexity: float | None = None
    unquantised_perplexity: float | None = None

    def __str__(self) -> str:
        parts = [
            ("KL {:.3g} nats", self.kl),
            ("at most {:.3g}", self.kl_largest),
            ("the same likeliest in {:.1%}", self.agreement),
            ("cosine distance {:.3g}", self.cosine_distance),
            ("difference {:.3g}", self.difference),
            ("perplexity {:.4g}", self.perplexity),
            ("unquantised {:.4g}", self.unquantised_perplexity),
        ]
        return ", ".join(text.format(value) for text, value in parts if value is not None)


@dataclass(frozen=True)
class ParityReport:
    """The comparisons of an artifact and their results.

    Attributes:
        artifact: the directory that was judged.
        kind: `merged`, `onnx` or `engine`.
        dtype: precision of the artifact, at which PyTorch's own error was measured.
        runner: what ran it, such as `onnxruntime CPUExecutionProvider`.
        inputs: how many inputs (rows) the errors are pooled over.
        seed: the seed of random inputs; None for given inputs.
        checks: the checks that ran.
        not_run: the checks that could not run.
        tools: versions by tool.
        coverage: what was compared, and what was not.
        rounding: of activations, where the base model is quantised and the runtime rounds them.
        price: of quantisation, adapter by adapter; told, and judged only by a check `price`.
        located: the first wrong modules of failures, where `--bisect` asked for them.
    """

    artifact: str
    kind: str
    dtype: str
    runner: str
    inputs: int
    seed: int | None
    checks: tuple[Check, ...] = ()
    not_run: tuple[NotRun, ...] = ()
    tools: dict[str, str] = field(default_factory=dict)
    coverage: tuple[Coverage, ...] = ()
    rounding: tuple[Rounding, ...] = ()
    price: tuple[Price, ...] = ()
    located: tuple[Located, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """`not run` if no check ran, which is no pass."""
        if not self.checks:
            return "not run"
        return "passed" if all(check.passed for check in self.checks) else "failed"

    @property
    def passed(self) -> bool:
        """Whether at least one check ran and all passed."""
        return self.verdict == "passed"

    @property
    def margin(self) -> float | None:
        """The smallest share of allowed error that is left over all outputs; None if none ran."""
        margins = [errors.margin for check in self.checks for errors in check.outputs]
        # NaN must not get lost in min().
        return min(margins, key=lambda m: m if m == m else float("-inf")) if margins else None

    def to_json(self) -> str:
        """The report as JSON text; numbers that are not finite become strings."""
        value: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict,
            "margin": self.margin,
            "factor": FACTOR,
            "histogram_decades": list(DECADES),
        } | asdict(self)
        for check, written in zip(self.checks, value["checks"], strict=True):
            for errors, output in zip(check.outputs, written["outputs"], strict=True):
                output |= {"passed": errors.passed, "margin": errors.margin}
        return to_json(value, non_finite=str, indent=2) + "\n"
