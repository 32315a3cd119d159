"""Generate with our exports as a client without this package does: optimum-onnx.

    python tests/interop/check_decoders.py DIRECTORY

DIRECTORY is what `export_decoders.py` wrote. Runs in an environment of its own (`make interop`).
Exits with 1 if any token is not the one that PyTorch generated.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForSeq2SeqLM

PADDING = 0


def main() -> None:
    directory = Path(sys.argv[1])
    told = json.loads((directory / "tokens.json").read_text())
    findings = []
    print(f"{'model':<8}{'artifact':<12}{'state':<8}{'rows':<6}equal tokens")
    for kind, expected in told["kinds"].items():
        encodes = kind in told["encoder_decoders"]
        family = ORTModelForSeq2SeqLM if encodes else ORTModelForCausalLM
        if expected["base"] == expected[told["adapter"]]:
            findings.append(f"{kind}: the adapter has too little effect for this to show anything")
        for artifact, state in (("folded", told["adapter"]), ("switchable", "base")):
            model = family.from_pretrained(directory / kind / artifact)
            if not model.can_use_cache:
                findings.append(f"{kind} {artifact}: is loaded without its cache")
            for rows, found in generations(model, expected["prompts"], told["new"]):
                equal = count_equal(found, expected[state])
                total = told["new"] * len(found)
                print(f"{kind:<8}{artifact:<12}{state:<8}{rows:<6}{equal} of {total}")
                if found != expected[state]:
                    findings.append(f"{kind} {artifact} {rows}: {equal} of {total} tokens")
    sys.exit("\n".join(findings) or 0)


def generations(
    model: ORTModelForCausalLM | ORTModelForSeq2SeqLM, prompts: list[list[int]], new: int
) -> Iterator[tuple[str, list[list[int]]]]:
    """The tokens behind each prompt alone, and in one batch: padded on the left to go on behind."""
    yield "alone", [generate(model, [prompt], new)[0] for prompt in prompts]
    yield "batch", generate(model, prompts, new)


def generate(
    model: ORTModelForCausalLM | ORTModelForSeq2SeqLM, prompts: list[list[int]], new: int
) -> list[list[int]]:
    longest = max(map(len, prompts))
    encodes = isinstance(model, ORTModelForSeq2SeqLM)
    tokens, mask = [], []
    for prompt in prompts:
        padding = longest - len(prompt)
        parts = [[PADDING] * padding, prompt], [[0] * padding, [1] * len(prompt)]
        for rows, (pad, real) in zip((tokens, mask), parts, strict=True):
            rows.append(real + pad if encodes else pad + real)
    found = model.generate(
        torch.tensor(tokens),
        attention_mask=torch.tensor(mask),
        use_cache=True,
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=new,
    )
    return found[:, 1 if encodes else longest :].tolist()


def count_equal(found: list[list[int]], expected: list[list[int]]) -> int:
    pairs = (pair for rows in zip(found, expected, strict=True) for pair in zip(*rows, strict=True))
    return sum(one == other for one, other in pairs)


if __name__ == "__main__":
    main()
