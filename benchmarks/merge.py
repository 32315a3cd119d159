"""`propulsion-export merge` beside `cp -r` and PEFT: time and memory.

    python benchmarks/merge.py [--gigabytes 4] [--placement all] [--rounds 3] [--directory DIR]
    python benchmarks/merge.py --adapters 20 --gigabytes 0.5     # one call, beside 20 copies

A sharded bfloat16 checkpoint of random weights in Llama's layout, and adapters with a random scale
on every output of the attention's or of all linear layers. Each round runs `cp -r` of the
checkpoint, an interpreter that does nothing, and the merge, as processes of their own; a round
before the first is not counted, because what is written into memory for the first time takes
longer. A ratio is the median over the rounds of the merge's time over that of the other two of the
same round. A merge ends when its files are on the disk, `cp -r` when they are in memory, so there
is a copy followed by `sync` too. PEFT loads, merges and saves the same scales, as (IA)^3, once.

Outputs are deleted and the disk is waited for before each measurement. Needs room for the
checkpoint and for two times the outputs.
"""

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale

HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, VOCABULARY = 2048, 5632, 32, 8, 32000
SHARD = 10**9  # bytes
PIECE = 1 << 24  # bytes of random weights in memory at a time
PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN * KEY_VALUE_HEADS // HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN * KEY_VALUE_HEADS // HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
PLACEMENTS = {"all": tuple(PROJECTIONS), "attention": tuple(PROJECTIONS)[:3]}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
PEFT = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
"""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Cost:
    """What a process took: seconds by the clock and of the processors, and its peak memory."""

    seconds: float
    cpu_seconds: float
    peak_megabytes: float


def shapes_of(layers: int) -> Shapes:
    """The parameters of a Llama, in the order of its file."""
    shapes: Shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        place = f"model.layers.{layer}"
        shapes |= {f"{place}.{path}.weight": shape for path, shape in PROJECTIONS.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{place}.{norm}.weight"] = (HIDDEN,)
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def layers_for(size: float) -> int:
    """The number of layers with which a checkpoint has about `size` bytes."""
    empty, one = (sum(map(size_of, shapes_of(layers).values())) for layers in (0, 1))
    return max(1, round((size - empty) / (one - empty)))


def size_of(shape: tuple[int, ...]) -> int:
    """In bytes, as bfloat16."""
    return 2 * int(np.prod(shape))


def write_base(directory: Path, layers: int) -> None:
    """Write a checkpoint in shards; never more than `PIECE` bytes of it are in memory."""
    directory.mkdir()
    chooser = np.random.default_rng(0)
    shards: list[Shapes] = [{}]
    for name, shape in shapes_of(layers).items():
        if sum(map(size_of, (*shards[-1].values(), shape))) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(shard, file)
        write_shard(directory / file, shard, chooser)
    total = sum(map(size_of, shapes_of(layers).values()))
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = CONFIG | {"num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(config))
    generation = {"bos_token_id": 1, "eos_token_id": 2}
    (directory / "generation_config.json").write_text(json.dumps(generation))


def write_shard(file: Path, shapes: Shapes, chooser: np.random.Generator) -> None:
    """Write one safetensors file of random bfloat16 numbers with magnitudes of 2^-11 to 2^-3."""
    header, end = {}, 0
    for name, shape in shapes.items():
        offsets = [end, end := end + size_of(shape)]
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": offsets}
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as content:
        content.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, PIECE):
            bits = np.frombuffer(chooser.bytes(min(PIECE, end - start)), np.uint16)
            content.write((bits & 0x83FF) | 0x3A00)


def write_adapters(directory: Path, base: Path, layers: int, placement: str, count: int) -> None:
    """Write Propulsion adapters `a0`, `a1`, …, and the first one as (IA)^3 too, for PEFT."""
    for number in range(count):
        chooser = np.random.default_rng(number)
        scales = {
            f"model.layers.{layer}.{path}": Scale(chooser.uniform(0.9, 1.1, PROJECTIONS[path][0]))
            for layer in range(layers)
            for path in PLACEMENTS[placement]
        }
        adapter = Adapter(f"a{number}", scales, task="text-generation", base=str(base))
        (directory / adapter.name).mkdir()
        adapter.write(directory / adapter.name)
        if number == 0:
            write_for_peft(directory / "ia3", scales, base, placement)


def write_for_peft(directory: Path, scales: dict[str, Scale], base: Path, placement: str) -> None:
    from safetensors.numpy import save_file

    directory.mkdir()
    config = {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "target_modules": [path.rpartition(".")[2] for path in PLACEMENTS[placement]],
        "feedforward_modules": [],
        "inference_mode": True,
    }
    vectors = {
        f"base_model.model.{path}.ia3_l": scale.values.astype(np.float32)[:, None]
        for path, scale in scales.items()
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(vectors, directory / "adapter_model.safetensors")


def cost_of(command: list[str | Path], output: Path | None = None) -> Cost:
    """Run a process with nothing left to write before it; `output` is deleted first.

    The memory is what the kernel counts as resident, mapped files included, but at least that of
    this process, which the child begins as.
    """
    if output is not None and output.exists():
        shutil.rmtree(output)
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} … exited with {process.returncode}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def copies(directory: Path, count: int, *, synced: bool = False) -> Cost:
    """`cp -r` of the base model, as many times as there are adapters, one after the other.

    It ends when the pages are in memory; `synced`, when they are on the disk, as a merge does.
    """
    outputs = [directory / f"copy{number}" for number in range(count)]
    for output in outputs:
        shutil.rmtree(output, ignore_errors=True)
    base = shlex.quote(str(directory / "base"))
    lines = [f"cp -r {base} {shlex.quote(str(output))}" for output in outputs]
    lines += [f"sync {shlex.quote(str(output))}/*" for output in outputs if synced]
    return cost_of(["sh", "-c", "; ".join(["set -e", *lines])])


def merge_command(directory: Path, count: int) -> list[str | Path]:
    """One merge of all adapters."""
    program = Path(sys.executable).with_name("propulsion-export")
    adapters = [f"a{number}={directory / f'a{number}'}" for number in range(count)]
    given = [word for adapter in adapters for word in ("-a", adapter)]
    return [program, "merge", *given, "-o", directory / "merged", "--quiet"]


def contenders(directory: Path, count: int) -> dict[str, Callable[[], Cost]]:
    """What each round runs."""
    merging = merge_command(directory, count)
    return {
        "cp -r": lambda: copies(directory, count),
        "cp -r, sync": lambda: copies(directory, count, synced=True),
        "interpreter": lambda: cost_of([sys.executable, "-c", "pass"]),
        "merge": lambda: cost_of(merging, directory / "merged"),
    }


def measure(directory: Path, count: int, rounds: int) -> dict[str, list[Cost]]:
    """Every contender's cost in each round; the first round is not counted."""
    runs = contenders(directory, count)
    measured: dict[str, list[Cost]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            cost = run()
            print(f"round {number}, {name}: {cost.seconds:.2f} s", file=sys.stderr)
            measured[name] += [cost] if number else []
    return measured


def report_on(measured: dict[str, list[Cost]]) -> dict[str, float]:
    """The ratios that are judged, and the merge's peak memory."""
    rounds = list(zip(*measured.values(), strict=True))
    return {
        "over_copy_and_start": statistics.median(
            merge.seconds / (copy.seconds + start.seconds) for copy, _, start, merge in rounds
        ),
        "over_synced_copy_and_start": statistics.median(
            merge.seconds / (copy.seconds + start.seconds) for _, copy, start, merge in rounds
        ),
        "over_copy_and_start_in_cpu_seconds": statistics.median(
            merge.cpu_seconds / (copy.cpu_seconds + start.cpu_seconds)
            for copy, _, start, merge in rounds
        ),
        "peak_megabytes": max(merge.peak_megabytes for merge in measured["merge"]),
    }


def peft(directory: Path) -> Iterator[tuple[str, Cost]]:
    """PEFT's own way with the same scales; what it wrote before is deleted."""
    output = directory / "peft"
    command = [sys.executable, "-c", PEFT, directory / "base", directory / "ia3", output]
    yield "PEFT", cost_of(command, output)
    shutil.rmtree(output)


def lines_of(name: str, costs: list[Cost]) -> str:
    """One line of text: medians, and the quartiles of the time."""
    times = [cost.seconds for cost in costs]
    low, high = np.percentile(times, [25, 75])
    cpu = statistics.median(cost.cpu_seconds for cost in costs)
    peak = max(cost.peak_megabytes for cost in costs)
    return (
        f"{name:12} {statistics.median(times):8.2f} s ({low:.2f} to {high:.2f})  "
        f"{cpu:8.2f} CPU-s  {peak:8.0f} MB at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4, help="Size of the checkpoint.")
    parser.add_argument("--placement", choices=PLACEMENTS, default="all")
    parser.add_argument("--adapters", type=int, default=1, help="Merged in one call.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="Default: a temporary one.")
    parser.add_argument(
        "--without-peft", action="store_true", help="PEFT needs the model's memory."
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        directory, layers = Path(folder), layers_for(options.gigabytes * 1e9)
        write_base(directory / "base", layers)
        write_adapters(directory, directory / "base", layers, options.placement, options.adapters)
        measured = measure(directory, options.adapters, options.rounds)
        report = report_on(measured)
        if not options.without_peft and importlib.util.find_spec("peft"):
            measured |= {name: [cost] for name, cost in peft(directory)}
            report["peft_over_merge"] = measured["PEFT"][0].seconds / statistics.median(
                cost.seconds for cost in measured["merge"]
            )
    if options.json:
        costs = {name: list(map(asdict, each)) for name, each in measured.items()}
        print(json.dumps(report | {"costs": costs}, indent=2))
    else:
        print(*(lines_of(name, costs) for name, costs in measured.items()), sep="\n")
        print(*(f"{name}: {value:.2f}" for name, value in report.items()), sep="\n")


if __name__ == "__main__":
    main()
