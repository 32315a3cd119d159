"""CPU-seconds of an export by its number of layers, and how far they are from linear.

    python benchmarks/export_time.py [--layers 16 32 64] [--hidden 64]

A narrow random Llama is exported switchable, without parity, in a process of its own for each
number of layers. The first two numbers give the line that the last one is compared with. Where
onnxruntime-genai is installed, its builder exports the same models beside it. CPU-seconds are those
of the whole process, start and imports included, with one thread.
"""

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

EXPORT = """
import sys
from pathlib import Path
from propulsion_export.pipeline.onnx import export_modes
from propulsion_export.pipeline.onnx_options import OnnxOptions
options = OnnxOptions(
    model=sys.argv[1],
    task="text-generation",
    placement="attention",
    exporter="transformers",
)
export_modes([], Path(sys.argv[2]), ["switchable"], options)
"""
BUILDER = ("-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu")


def write_base(directory: Path, layers: int, hidden: int) -> None:
    """A narrow Llama with a byte-level tokenizer, which the builder asks for."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=300,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * hidden,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    words = {f"w{number}": number for number in range(300)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", bos_token="w1", eos_token="w2", pad_token="w2"
    ).save_pretrained(directory)


def cpu_seconds(*arguments: str) -> float:
    """CPU-seconds of a Python process with these arguments, its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *arguments],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def beyond_linear(layers: list[int], seconds: list[float]) -> float:
    """The last measurement over the line through the first two; 1 is linear."""
    slope = (seconds[1] - seconds[0]) / (layers[1] - layers[0])
    return seconds[-1] / (seconds[1] + slope * (layers[-1] - layers[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs=3, default=[16, 32, 64])
    parser.add_argument("--hidden", type=int, default=64)
    options = parser.parse_args()
    torch.manual_seed(0)
    with_builder = importlib.util.find_spec("onnxruntime_genai") is not None
    measured: dict[str, list[float]] = {"export": []} | ({"builder": []} if with_builder else {})
    with tempfile.TemporaryDirectory() as folder:
        for layers in options.layers:
            base, out = Path(folder) / f"base{layers}", Path(folder) / f"out{layers}"
            write_base(base, layers, options.hidden)
            print(f"{layers} layers", file=sys.stderr)
            measured["export"].append(cpu_seconds("-c", EXPORT, str(base), str(out)))
            if with_builder:
                places = ("-i", str(base), "-o", f"{out}-builder", "-c", f"{out}-cache")
                measured["builder"].append(cpu_seconds(*BUILDER, *places))
    report = {
        name: {
            "cpu_seconds": dict(zip(options.layers, seconds, strict=True)),
            "over_linear": beyond_linear(options.layers, seconds),
        }
        for name, seconds in measured.items()
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
