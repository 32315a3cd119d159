"""What the graph benchmarks share: a random adapter's exports, the base graph, tokens."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from propulsion_export import Adapter, export_onnx
from propulsion_export.adapters.scales import Scale
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.graph.files import write_graph
from propulsion_export.graph.optimise import optimise
from propulsion_export.graph.passes.dimensions import NameDimensions
from propulsion_export.graph.sample_inputs import input_names, trace_inputs
from propulsion_export.graph.trace import trace
from propulsion_export.scaling.layer_rules import output_width

# A part of the module paths of a BERT that each placement scales.
BERT_PLACEMENTS = {"all": "", "attention": "attention.self."}


def write_random_adapter(
    model: torch.nn.Module, directory: Path, part: str, *, base: Path, task: str, seed: int = 0
) -> None:
    """Write an adapter with scales on every Linear and Embedding in whose path `part` is found.

    `part` is a regular expression.
    """
    chooser = np.random.default_rng(seed)
    scales = {
        path: Scale(chooser.uniform(0.9, 1.1, output_width(module)))
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding) and re.search(part, path)
    }
    adapter = Adapter("random", scales, task=task)
    directory.mkdir()
    replace(adapter, base=str(base), fingerprint=fingerprint_of_model(model)).write(directory)


def export_modes(directory: Path, modes: Sequence[str]) -> None:
    """Export the adapter at `directory/adapter` into a directory for each mode beside it."""
    for mode in modes:
        export_onnx([f"random={directory / 'adapter'}"], directory / mode, mode=mode)


def export_base(model: torch.nn.Module, directory: Path) -> Path:
    """Export an encoder without an adapter; returns the path of the graph."""
    program = trace(model, trace_inputs(input_names(type(model), model.config), model.config))
    NameDimensions()(program)
    directory.mkdir()
    return write_graph(optimise(program), directory)


def bert_inputs(batch: int, length: int) -> dict[str, np.ndarray]:
    """Random tokens, none of them padding."""
    tokens = np.random.default_rng(1).integers(1000, 30000, (batch, length))
    return {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "token_type_ids": np.zeros_like(tokens),
    }
