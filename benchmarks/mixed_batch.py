"""The cost of a different adapter in every row, compared with the alternatives.

    python benchmarks/mixed_batch.py [--placement attention] [--batch 8] [--rounds 10]

An encoder of BERT-base's size with random weights. Every round runs each subject once, in a new
order, so that a slower machine affects all alike; the figure is the median over rounds of the ratio
to the folded graph in the same round. Graphs run in ONNX Runtime on the CPU, PyTorch beside
them on as many threads; each PyTorch subject is also compared with PyTorch's base model. LoRA
has rank 8 on the same modules, embeddings left out, which PEFT does not mix.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel

from prepared import (
    BERT_PLACEMENTS,
    bert_inputs,
    export_base,
    export_modes,
    write_random_adapter,
)
from propulsion_export import Artifact
from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.artifacts.layout import packed_inputs, to_row
from propulsion_export.artifacts.manifest import AdapterEntry
from propulsion_export.artifacts.tensor_names import BANK_INPUT, IDS_INPUT
from propulsion_export.base_model.loading import load_base
from propulsion_export.graph.files import write_graph
from propulsion_export.graph.optimise import optimise
from propulsion_export.graph.passes.dimensions import NameDimensions
from propulsion_export.graph.sample_inputs import TRACED_ROWS, input_names, trace_inputs
from propulsion_export.graph.trace import trace
from propulsion_export.runners.onnxruntime import onnxruntime_runner, place
from propulsion_export.scaling.layer_rules import output_width
from propulsion_export.serving.roster import BankRoster

TASK = "feature-extraction"
RANK = 8
ADAPTERS = (1, 8, 1000)
FOLDED, TORCH = "folded", "PyTorch, base"


def prepare(directory: Path, placement: str, layers: int) -> torch.nn.Module:
    """Write the base model, adapter and three exports below `directory`; return the model."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(num_hidden_layers=layers)).eval()
    model.save_pretrained(directory / "model")
    part, base = BERT_PLACEMENTS[placement], directory / "model"
    write_random_adapter(model, directory / "adapter", part, base=base, task=TASK)
    export_modes(directory, ("folded", "switchable", "bank"))
    return load_base(str(base), task=TASK).model


def targets(model: torch.nn.Module, placement: str) -> list[str]:
    """Paths of the Linears that the adapters act on."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and BERT_PLACEMENTS[placement] in path
    ]


@contextmanager
def lora_as_input(model: torch.nn.Module, paths: list[str], *, per_row: bool) -> Iterator[int]:
    """Give the model one more input, `lora`, with all A and B; yields its width.

    Its shape is [batch, width] with a LoRA for each row, or [1, width] with one for all.
    """
    parts: dict[str, torch.Tensor] = {}
    sizes = {path: (model.get_submodule(path).in_features, output_width(model.get_submodule(path)))
             for path in paths}  # fmt: skip
    lengths = [RANK * (inner + outer) for inner, outer in sizes.values()]

    def take(module, arguments, named):
        parts.update(zip(paths, named.pop("lora").split(lengths, dim=1), strict=True))
        return arguments, named

    def add(path, module, arguments, output):
        inner, outer = sizes[path]
        down, up = parts[path].split([RANK * inner, RANK * outer], dim=1)
        down, up = down.reshape(-1, inner, RANK), up.reshape(-1, RANK, outer)
        values = arguments[0]
        if not per_row:
            return output + values @ down[0] @ up[0]
        flat = values if values.ndim == 3 else values[:, None]
        return output + (flat @ down @ up).reshape(output.shape)

    hooks = [model.register_forward_pre_hook(take, with_kwargs=True)]
    hooks += [model.get_submodule(path).register_forward_hook(partial(add, path)) for path in paths]
    try:
        yield sum(lengths)
    finally:
        for hook in hooks:
            hook.remove()


def write_lora(model: torch.nn.Module, directory: Path, paths: list[str], *, per_row: bool) -> int:
    """Trace the model with LoRA as an input; returns the width of that input."""
    inputs = trace_inputs(input_names(type(model), model.config), model.config)
    with lora_as_input(model, paths, per_row=per_row) as width:
        rows = torch.rand(TRACED_ROWS if per_row else 1, width)
        program = trace(model, inputs, extra={"lora": rows})
    NameDimensions()(program)
    directory.mkdir()
    write_graph(optimise(program), directory)
    return width


def graph_subjects(directory: Path, model, placement: str, batch: int) -> dict[str, Callable]:
    """By name, functions that run one batch of tokens in ONNX Runtime."""
    chooser = np.random.default_rng(2)
    subjects = {"base": onnxruntime_runner(export_base(model, directory / "base"))}
    subjects[FOLDED] = onnxruntime_runner(directory / "folded" / "model.onnx")
    switchable = Artifact.read(directory / "switchable")
    run, feeds = onnxruntime_runner(switchable.path), dict(switchable.feeds("random"))
    subjects["switchable, one adapter"] = partial(with_feeds, run, feeds)
    subjects["switchable, a row at a time"] = partial(row_by_row, run, [feeds] * batch)
    banked = Artifact.read(directory / "bank")
    run = onnxruntime_runner(banked.path)
    row = to_row(packed_inputs(banked, BASE_NAME), banked.manifest.layout)
    for count in ADAPTERS:
        rows = np.float32(row * chooser.uniform(0.9, 1.1, (count + 1, row.size)))
        ids = chooser.choice(count, batch, replace=count < batch) + 1
        bank = {BANK_INPUT: place(rows, "cpu"), IDS_INPUT: ids}
        subjects[f"bank of {count:,}"] = partial(with_feeds, run, bank)
    for name, per_row in (("LoRA as inputs, one", False), ("LoRA as inputs, one a row", True)):
        folder = directory / f"lora-{per_row}"
        width = write_lora(model, folder, targets(model, placement), per_row=per_row)
        lora = chooser.normal(0, 0.02, (batch if per_row else 1, width)).astype(np.float32)
        run = onnxruntime_runner(folder / "model.onnx")
        subjects[name] = partial(with_feeds, run, {"lora": lora})
    return subjects


def torch_subjects(model, placement: str, batch: int) -> dict[str, Callable]:
    """The same in PyTorch: the base model, and PEFT's LoRA with an adapter for each row."""
    subjects = {TORCH: partial(in_torch, load_copy(model), {})}
    config = LoraConfig(r=RANK, target_modules=targets(model, placement), init_lora_weights=False)
    mixed = get_peft_model(load_copy(model), config, adapter_name="a0")
    for number in range(1, batch):
        mixed.add_adapter(f"a{number}", config)
    names = {"adapter_names": [f"a{number}" for number in range(batch)]}
    subjects["PyTorch, PEFT LoRA, one a row"] = partial(in_torch, mixed.eval(), names)
    return subjects


def load_copy(model) -> torch.nn.Module:
    copied = BertModel(model.config).eval()
    copied.load_state_dict(model.state_dict())
    return copied


def with_feeds(run: Callable, feeds: dict, inputs: dict) -> None:
    run(inputs | feeds)


def row_by_row(run: Callable, feeds: list[dict], inputs: dict) -> None:
    for row, own in enumerate(feeds):
        run({name: values[row : row + 1] for name, values in inputs.items()} | own)


def in_torch(model: torch.nn.Module, named: dict, inputs: dict) -> None:
    with torch.inference_mode():
        model(**{name: torch.from_numpy(values) for name, values in inputs.items()}, **named)


def measure(subjects: dict[str, Callable], batch: int, length: int, rounds: int) -> dict:
    inputs = bert_inputs(batch, length)
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    order, shuffler = list(subjects), random.Random(0)
    for number in range(rounds + 2):
        shuffler.shuffle(order)
        for name in order:
            started = time.perf_counter()
            subjects[name](inputs)
            if number > 1:  # the first runs allocate
                seconds[name].append(time.perf_counter() - started)
    result = {name: ratios(seconds[name], seconds[FOLDED], FOLDED) for name in subjects}
    for name in subjects:
        if name.startswith("PyTorch"):
            result[name] |= ratios(seconds[name], seconds[TORCH], TORCH)
    return result


def measure_switching(directory: Path, batch: int) -> dict[str, float]:
    """Milliseconds per adapter to look up a batch of adapters that the last batch did not use.

    At the first use of an adapter its row is read and compared with its checksum.
    """
    artifact = Artifact.read(directory / "bank")
    bank, chooser = artifact.open_bank(), np.random.default_rng(3)
    names = [f"a{number}" for number in range(ADAPTERS[-1] // batch * batch)]
    for name in names:
        row = chooser.uniform(0.9, 1.1, bank.width).astype(np.float32)
        bank.add(name, row, AdapterEntry(f"sha256:{name}", name, bank.width))
    roster = BankRoster.read(artifact, partial(place, device="cpu"))
    batches = [names[start : start + batch] for start in range(0, len(names), batch)]
    medians = {}
    for use in ("first", "later"):
        seconds = []
        for adapters in batches:
            started = time.perf_counter()
            roster.groups(adapters, batch)
            seconds.append(time.perf_counter() - started)
        medians[f"milliseconds to switch an adapter, {use}"] = round(
            statistics.median(seconds) / batch * 1000, 3
        )
    return medians


def ratios(times: list[float], peer: list[float], name: str) -> dict:
    each = [taken / other for taken, other in zip(times, peer, strict=True)]
    return {
        f"median ratio to {name}": round(statistics.median(each), 3),
        f"quartiles to {name}": [round(cut, 3) for cut in statistics.quantiles(each)[::2]],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--placement", choices=BERT_PLACEMENTS, default="all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = prepare(Path(directory), options.placement, options.layers)
        subjects = graph_subjects(Path(directory), model, options.placement, options.batch)
        subjects |= torch_subjects(model, options.placement, options.batch)
        result = measure(subjects, options.batch, options.length, options.rounds)
        result |= measure_switching(Path(directory), options.batch)
    print(json.dumps(vars(options) | result, indent=2))


if __name__ == "__main__":
    main()
