"""The cost of a generated token: merged in PyTorch, and the folded and the switchable graph.

    python benchmarks/decoding_cost.py [--placement attention] [--batch 1] [--rounds 10]

A random Llama of 58 million parameters continues a prompt greedily, with its cache. Every round
runs each of them once, so that a slower machine affects all alike; the figure is the median over
rounds of the ratio to the folded graph in the same round. Graphs run in ONNX Runtime on the CPU,
with the cache passed as arrays at every step, as in `run`.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from prepared import export_modes, write_random_adapter
from propulsion_export import Artifact, merge
from propulsion_export.runners.decoding import generate, greedy
from propulsion_export.runners.opening import choose_runner, open_candidate

PLACEMENTS = {"all": "model.", "attention": "self_attn."}
NEVER = 10**9  # an end token that is never generated


def prepare(directory: Path, placement: str) -> None:
    """Write the base model, adapter, merged checkpoint and both graphs below `directory`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16000,
        hidden_size=640,
        num_hidden_layers=8,
        num_attention_heads=10,
        num_key_value_heads=5,
        intermediate_size=1728,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory / "base")
    write_random_adapter(
        model,
        directory / "adapter",
        PLACEMENTS[placement],
        base=directory / "base",
        task="text-generation",
    )
    merge(directory / "adapter", directory / "merged")
    export_modes(directory, ("folded", "switchable"))


def candidates(directory: Path, prompt: np.ndarray, tokens: int) -> dict[str, Callable[[], object]]:
    """The functions to time, by name."""
    merged = AutoModelForCausalLM.from_pretrained(directory / "merged").eval()
    ids = torch.from_numpy(prompt)
    mask = torch.ones_like(ids)
    graphs = {}
    for mode in ("folded", "switchable"):
        artifact = Artifact.read(directory / mode)
        model = open_candidate(artifact, choose_runner(artifact, "auto"))
        feeds = {
            "input_ids": prompt,
            "attention_mask": np.ones_like(prompt),
            **artifact.feeds("random"),
        }
        graphs[mode] = lambda model=model, feeds=feeds: list(
            itertools.islice(generate(model, feeds, greedy), tokens)
        )
    return {
        **graphs,
        "PyTorch, merged": lambda: merged.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=NEVER,
            pad_token_id=0,
        ),
    }  # fmt: skip


def measure(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, object]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {
        name: round(
            statistics.median(
                taken / folded
                for taken, folded in zip(times[1:], seconds["folded"][1:], strict=True)
            ),
            3,
        )
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--placement", choices=PLACEMENTS, default="all")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    prompt = np.random.default_rng(1).integers(10, 15000, (options.batch, options.prompt))
    with tempfile.TemporaryDirectory() as directory:
        prepare(Path(directory), options.placement)
        runs = candidates(Path(directory), prompt, options.tokens)
        result = measure(runs, options.rounds)
    print(json.dumps({**vars(options), "median ratio to folded": result}, indent=2))


if __name__ == "__main__":
    main()
