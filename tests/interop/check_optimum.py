"""Load our exports as a client without this package does: optimum-onnx and plain transformers.

    python tests/interop/check_optimum.py DIRECTORY

DIRECTORY is what `export.py` wrote. Runs in an environment of its own (`make interop`), because
optimum-onnx needs an older transformers. Exits with 1 if anything is not what PyTorch computed.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from optimum.onnxruntime import ORTModelForSequenceClassification
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

Tensors = dict[str, np.ndarray]

# Share of the largest logit. Float32 rounding over six layers stays below it; the adapter's effect
# has to be a thousand times as large, so that one state cannot pass for the other.
TOLERANCE = 1e-5
EFFECT = 1000 * TOLERANCE


def main() -> None:
    directory = Path(sys.argv[1])
    with safe_open(directory / "expected.safetensors", "np") as file:
        told = file.metadata()
        expected = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    logits = {state: expected.pop(f"logits.{state}") for state in ("base", told["adapter"])}
    findings = []
    if distance(logits["base"], logits[told["adapter"]]) < EFFECT:
        findings.append("the adapter has too little effect for this to show anything")
    print(f"{'artifact':<12}{'loaded by':<36}{'state':<8}error / largest logit")
    for artifact, loaded, state, compute in computations(directory, told["adapter"]):
        tokens = tokens_of(directory / artifact, told["texts"].split("\n"))
        error = distance(compute(tokens), logits[state])
        print(f"{artifact:<12}{type(loaded).__name__:<36}{state:<8}{error:.1e}")
        if not error <= TOLERANCE:  # NaN must not pass
            findings.append(f"{artifact}: {state} is off by {error:.1e}, allowed {TOLERANCE:.0e}")
        if not same(tokens, expected):
            findings.append(f"{artifact}: the tokenizer gives other tokens")
        if list(loaded.config.id2label.values()) != told["labels"].split("\n"):
            findings.append(f"{artifact}: the labels are {loaded.config.id2label}")
    sys.exit("\n".join(findings) or 0)


def computations(
    directory: Path, adapter: str
) -> Iterator[tuple[str, object, str, Callable[[Tensors], np.ndarray]]]:
    """Artifact, what loaded it, the state it is in, and how to compute the logits there."""
    merged = AutoModelForSequenceClassification.from_pretrained(directory / "merged").eval()
    yield "merged", merged, adapter, lambda tokens: forward(merged, tokens)
    folded = ORTModelForSequenceClassification.from_pretrained(directory / "folded")
    yield "folded", folded, adapter, lambda tokens: forward(folded, tokens)
    switchable = ORTModelForSequenceClassification.from_pretrained(directory / "switchable")
    yield "switchable", switchable, "base", lambda tokens: forward(switchable, tokens)
    feeds = load_file(directory / "switchable" / "adapters" / f"{adapter}.safetensors")
    yield (
        *("switchable", switchable, adapter),
        lambda tokens: switchable.session.run(["logits"], tokens | feeds)[0],
    )
    # And without feeds again: an adapter that was fed leaves no trace.
    yield "switchable", switchable, "base", lambda tokens: forward(switchable, tokens)


def tokens_of(directory: Path, texts: list[str]) -> Tensors:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return dict(tokenizer(texts, padding=True, return_tensors="np"))


@torch.no_grad()
def forward(model: Callable, tokens: Tensors) -> np.ndarray:
    return model(**{name: torch.from_numpy(ids) for name, ids in tokens.items()}).logits.numpy()


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest expected number."""
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name], expected[name]) for name in expected
    )


if __name__ == "__main__":
    main()
