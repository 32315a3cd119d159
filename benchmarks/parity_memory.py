"""The memory of `propulsion-export parity --low-memory`, with what needs it told apart.

    python benchmarks/parity_memory.py [--layers 16] [--width 2048] [--vocabulary 32000]
        [--quick] [--directory DIR]

A random Llama in float32, by default of a billion parameters, with an attention adapter, exported
switchable. Three processes, one after the other:

- `oracle`: PyTorch computes all that the verdict asks for, layer by layer, and no runtime is there.
- `runtime`: ONNX Runtime opens the graph and runs a batch, and PyTorch computes nothing.
- `command`: the whole command, with `--quick` if asked.

What is counted is anonymous memory (RssAnon): files that are mapped are the kernel's to take back.
What libraries hold before the model is read is taken off `oracle` and `runtime`. Beside them are
the sizes that docs/parity.md names: two layers, the embeddings, and the logits that are compared.
All figures are in MB. Needs Linux, and disk for the weights twice.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Freed memory goes back to the system at once, and is not counted as held.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "CUDA_VISIBLE_DEVICES": ""}
INTERVAL = 0.005  # seconds between two looks


def main() -> None:
    if sys.argv[1:2] == ["part"]:
        print(json.dumps(PARTS[sys.argv[2]](Path(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048, help="hidden size, a multiple of 64")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--quick", action="store_true", help="for the command")
    parser.add_argument("--directory", type=Path, help="for the model and the graph, and kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = options.directory or Path(name)
        if not (directory / "graph").exists():
            prepare(directory, options.layers, options.width, options.vocabulary)
        result = sizes(options.width, options.vocabulary)
        result |= in_a_process("oracle", directory) | in_a_process("runtime", directory)
        result |= command(directory, ["--quick"] if options.quick else [])
    print(json.dumps({name: round(value / 1e6) for name, value in result.items()}, indent=2))


def sizes(width: int, vocabulary: int) -> dict[str, float]:
    """Bytes in float64 of two layers, and of one table of embeddings."""
    attention = width * width * 2 + width * width // 2
    return {
        "two layers": 2 * 8 * (attention + 3 * width * 4 * width),
        "embeddings": 8 * width * vocabulary,
    }


def prepare(directory: Path, layers: int, width: int, vocabulary: int) -> None:
    """Write the base model and an adapter, and export them in a process of their own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from prepared import write_random_adapter

    heads = width // 64
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 4,
            intermediate_size=4 * width,
            pad_token_id=2,
        )
    ).eval()
    model.save_pretrained(directory / "base")
    write_random_adapter(
        model, directory / "adapter", "self_attn.", base=directory / "base", task="text-generation"
    )
    del model
    adapter = f"random={directory / 'adapter'}"
    run("onnx", "-a", adapter, "--mode", "switchable", "-o", directory / "graph", "--no-parity")


def run(*arguments: str | Path) -> None:
    subprocess.run([COMMAND, *map(str, arguments)], check=True, stdout=sys.stderr)


COMMAND = str(Path(sys.executable).with_name("propulsion-export"))


def in_a_process(part: str, directory: Path) -> dict[str, float]:
    asked = subprocess.run(
        [sys.executable, __file__, "part", part, str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | ENVIRONMENT,
    )
    return json.loads(asked.stdout.splitlines()[-1])


def command(directory: Path, options: list[str]) -> dict[str, float]:
    """The most memory of the whole command."""
    process = subprocess.Popen(
        [COMMAND, "parity", str(directory / "graph"), "--low-memory", "--device", "cpu", *options],
        stdout=sys.stderr,
        env=os.environ | ENVIRONMENT,
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, held(process.pid))
        time.sleep(INTERVAL)
    assert process.returncode == 0, process.returncode
    return {"command": peak}


def oracle(directory: Path) -> dict[str, float]:
    """The most memory beyond the libraries' while the oracle computes, and the logits' bytes."""
    import numpy as np

    from propulsion_export.adapters.adapter import Adapter
    from propulsion_export.artifacts.artifact import Artifact
    from propulsion_export.parity.by_layer import compute_by_layer
    from propulsion_export.parity.inputs import load_recorded_base, make_batches
    from propulsion_export.parity.oracle import GREEDY_STEPS, compute_oracle

    artifact = Artifact.read(directory / "graph")
    adapter = Adapter.read(directory / "adapter", "random")

    def judge() -> Any:
        base = load_recorded_base(artifact, [adapter], None)
        return compute_oracle(
            artifact,
            base,
            [adapter],
            make_batches(base, None, 0, short=False),
            lambda *_: None,
            compute=compute_by_layer("cpu"),
            draft=lambda prompt, steps: (np.full((3, steps), 7), np.ones((3, steps))),
            steps=GREEDY_STEPS,
        )

    before = held()
    subjects, peak = watched(judge)
    logits = sum(
        values.nbytes
        for one in subjects
        for outputs in (*one.oracle, *one.reference, *(one.unscaled or ()))
        for values in outputs.values()
    )
    return {"oracle": peak - before, "logits that the oracle returns": logits}


def runtime(directory: Path) -> dict[str, float]:
    """The most memory that opening the graph and generating a few tokens takes."""
    import numpy as np

    from propulsion_export.artifacts.artifact import Artifact
    from propulsion_export.parity.generation import continue_greedily
    from propulsion_export.runners.opening import open_candidate

    artifact = Artifact.read(directory / "graph")
    prompt = {"input_ids": np.full((4, 40), 7), "attention_mask": np.ones((4, 40), np.int64)}

    def generate() -> object:
        return continue_greedily(open_candidate(artifact, "onnxruntime"), prompt, 4)

    before = held()
    _, peak = watched(generate)
    return {"runtime": peak - before}


PARTS: dict[str, Callable[[Path], dict[str, float]]] = {"oracle": oracle, "runtime": runtime}


def watched(work: Callable[[], Any]) -> tuple[Any, int]:
    """What the work returns, and the most memory that this process held meanwhile."""
    peaks, over = [0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            peaks.append(held())
            time.sleep(INTERVAL)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        return work(), max(peaks)
    finally:
        over.set()
        watching.join()


def held(process: int | str = "self") -> int:
    """Anonymous memory of a process, in bytes; 0 if it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+)", status)
    return 1024 * int(found[1]) if found else 0


if __name__ == "__main__":
    main()
