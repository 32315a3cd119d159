"""The cost of a verdict beside PyTorch's own forward passes of the same tokens.

    python benchmarks/parity_cost.py [--layers 4] [--width 576] [--vocabulary 49152] [--low-memory]

A random Llama in float32, by default as wide as SmolLM2-135M, with an attention adapter, is
exported switchable and judged: two states, in float64, in float32 and by the graph in ONNX Runtime,
with greedy continuations. Beside it PyTorch computes the 16 rows of the comparison once in float32,
in padded batches. Both run in this process, the forward passes `--rounds` times after one that does
not count; figures are wall and CPU seconds, and ratios to the median forward pass. `stages` has the
seconds that have passed when each stage begins. The export is not counted.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from prepared import write_random_adapter
from propulsion_export import check_parity, export_onnx
from propulsion_export.parity.inputs import decoder_inputs


class Clock:
    """Wall and CPU seconds of this process, all threads, since it was made."""

    def __init__(self) -> None:
        self.started = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        now = time.perf_counter(), time.process_time()
        wall, cpu = (after - before for after, before in zip(now, self.started, strict=True))
        return {"wall": round(wall, 2), "cpu": round(cpu, 2)}


def prepare(directory: Path, layers: int, width: int, vocabulary: int) -> None:
    """Write the base model, an adapter and the switchable export below `directory`."""
    torch.manual_seed(0)
    heads = max(width // 64, 1)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
        intermediate_size=width * 8 // 3,
        tie_word_embeddings=True,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory / "base")
    write_random_adapter(
        model, directory / "adapter", "self_attn.", base=directory / "base", task="text-generation"
    )
    adapter = f"random={directory / 'adapter'}"
    export_onnx([adapter], directory / "graph", mode="switchable")


def forward(directory: Path, rounds: int) -> dict[str, float]:
    """Median seconds of PyTorch's forward passes of the same rows, in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32).eval()
    batches = [
        {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in batch.items()}
        for batch in decoder_inputs(model.config, seed=0)
    ]
    taken = []
    for _ in range(rounds + 1):
        clock = Clock()
        with torch.inference_mode():
            for batch in batches:
                model(**batch)
        taken.append(clock.read())
    return {name: statistics.median(each[name] for each in taken[1:]) for name in ("wall", "cpu")}


def judge(directory: Path, *, low_memory: bool) -> tuple[dict[str, float], dict[str, object]]:
    """Seconds of a verdict, and how many have passed before each of its stages."""
    stages: dict[str, object] = {}
    clock = Clock()

    def note(share: float, message: str) -> None:
        del share
        stages[message] = clock.read()

    report = check_parity(directory / "graph", device="cpu", low_memory=low_memory, progress=note)
    assert report.passed
    return clock.read(), stages


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=576, help="hidden size, a multiple of 64")
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--low-memory", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepare(directory, options.layers, options.width, options.vocabulary)
        own = forward(directory, options.rounds)
        taken, stages = judge(directory, low_memory=options.low_memory)
    ratios = {name: round(taken[name] / own[name], 1) for name in own}
    result = {"forward": own, "verdict": taken, "ratio": ratios, "stages": stages}
    print(json.dumps({**vars(options), **result}, indent=2))


if __name__ == "__main__":
    main()
