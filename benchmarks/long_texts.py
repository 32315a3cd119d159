"""What a long text costs the tokenizer of an artifact, cut before it is tokenised and whole.

    python benchmarks/long_texts.py DIR [--megabytes 1] [--limit 512] [--text words]

DIR is an artifact, or the directory of a model's tokenizer. Each way runs in a process of its own;
prints seconds and the memory that was added at most. `--text` is one of: words; pairs, two texts of
that size; unbroken, one word without an end.
"""

import argparse
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

from propulsion_export.base_model.tokenizer.cutting import TextCutter
from propulsion_export.base_model.tokenizer.reading import encode_texts, read_serving_tokenizer

NAMES = ("input_ids", "attention_mask")
WORDS = (
    *("the large wild cat with stripes", "runs through a forest,", "and nobody sees it."),
    *("Grüße aus Köln!", "In 1984 there were 12 of them;", "its habitat: Asia"),
)


def made(megabytes: float, kind: str) -> tuple[list[str], list[str] | None]:
    size = int(megabytes * 1e6)
    if kind == "unbroken":
        letters = np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), size)
        return ["".join(letters)], None
    chosen = np.random.default_rng(0).choice(WORDS, size // 20)
    text = " ".join(chosen)[:size]
    return [text], [text[::-1]] if kind == "pairs" else None


def measure(directory: Path, limit: int, megabytes: float, kind: str, whole: bool) -> Any:
    """Seconds, MB and tokens of encoding one row for the first time."""
    tokenizer = read_serving_tokenizer(directory)
    texts, contexts = made(megabytes, kind)
    encode_texts(NAMES, tokenizer, ["a cat"], limit=limit)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if not whole:
        texts, contexts = TextCutter(tokenizer).cut(texts, contexts, limit)
    encoding = encode_texts(NAMES, tokenizer, texts, limit=limit, contexts=contexts)
    seconds = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return seconds, memory / 1e3, encoding["input_ids"].tolist()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--megabytes", type=float, default=1)
    parser.add_argument("--limit", type=int, default=512, help="tokens of a row")
    parser.add_argument("--text", choices=("words", "pairs", "unbroken"), default="words")
    options = parser.parse_args()
    found = []
    for way in ("cut", "whole"):
        given = (options.directory, options.limit, options.megabytes, options.text, way == "whole")
        with multiprocessing.get_context("spawn").Pool(1) as process:
            seconds, memory, tokens = process.apply(measure, given)
        found.append(tokens)
        print(f"{way:6} {seconds:9.4f} s {memory:7.0f} MB", flush=True)
    assert found[0] == found[1], "the tokens differ"


if __name__ == "__main__":
    main()
