"""Package a causal language model with the configuration that onnxruntime-genai reads."""

import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.bank import Bank
from propulsion_export.artifacts.file_names import (
    ADAPTERS_FILE,
    BANK_ARRAY_FILE,
    GENAI_CONFIG_FILE,
    GRAPH_FILE,
)
from propulsion_export.artifacts.manifest import TensorSpec
from propulsion_export.artifacts.tensor_names import LOGITS, PAST, PRESENT
from propulsion_export.base_model.config import read_config
from propulsion_export.base_model.generation_settings import GenerationSettings
from propulsion_export.base_model.rope_switch import rope_switches
from propulsion_export.base_model.special_tokens import SpecialTokens
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.errors import UsageError
from propulsion_export.packaging.copying import copy_artifact_files
from propulsion_export.packaging.layouts import PackageOptions, WritePackage
from propulsion_export.packaging.onnx_adapter import write_adapter_files
from propulsion_export.packaging.triton import adapters_text, rows_in_use

# Where a model has no positions to run out of (ALiBi), onnxruntime-genai still wants a limit.
_UNLIMITED = 32768
# Its name for any graph of the inputs and outputs below. For the architectures whose names it
# knows (`llama`, `phi3`) it does nothing else; for others (`gptj`, `bloom`) it has no name.
_TYPE = "decoder"
# Settings for choosing tokens that it applies as transformers does (0.18).
_SEARCH = ("repetition_penalty", "no_repeat_ngram_size", "min_length")
_READ = ("input_ids", "attention_mask", "position_ids")


def plan(artifact: Artifact, options: PackageOptions) -> WritePackage:
    """Check that onnxruntime-genai can run the artifact; return what writes the package.

    Raises:
        UsageError: the artifact is no export of a causal language model, or in bfloat16.
    """
    del options
    _check_fits(artifact)

    def write(directory: Path) -> Iterable[str]:
        copy_artifact_files(artifact, artifact.manifest.files, directory)
        if not artifact.manifest.pads_right:  # the builder's graphs have theirs
            _write_config(artifact, directory)
        if artifact.manifest.mode == "bank":
            return _write_bank(artifact, directory)
        return write_adapter_files(artifact, directory)

    return write


def next_command(directory: Path, adapters: Sequence[str]) -> str:
    """The command that uses the package."""
    del adapters
    code = f"import onnxruntime_genai as og; og.Model({str(directory)!r})"
    return f"python -c {shlex.quote(code)}"


def _write_config(artifact: Artifact, directory: Path) -> None:
    config = read_config(str(directory))
    longest = getattr(config, "max_position_embeddings", None) or _UNLIMITED
    # The runtime does not compute a text again where its rotary frequencies change.
    longest = min(longest, *rope_switches(config.to_dict()), longest)
    special = SpecialTokens.read(directory)
    content = genai_config(artifact.manifest.inputs, config, special, longest=longest)
    content["search"] |= _search(GenerationSettings.read(directory))
    text = json.dumps(content, indent=2) + "\n"
    (directory / GENAI_CONFIG_FILE).write_text(text, encoding="utf-8")


def _write_bank(artifact: Artifact, directory: Path) -> Iterable[str]:
    """Write the bank, also as an array for numpy, the id of each adapter, and the manifest.

    Returns:
        The names of the adapters.
    """
    artifact.open_bank().copy(directory)
    snapshot = Bank.open(directory).snapshot()
    rows = rows_in_use(snapshot)
    np.save(directory / BANK_ARRAY_FILE, snapshot.values)
    ids = {name: row.number for name, row in rows.items()}
    entries = {name: row.entry for name, row in snapshot.rows.items()}
    text = adapters_text(ids, entries, artifact.manifest.base)
    (directory / ADAPTERS_FILE).write_text(text, encoding="utf-8")
    Artifact.write(directory, artifact.manifest)
    return ids


def genai_config(
    inputs: Sequence[TensorSpec], config: Any, special: SpecialTokens, *, longest: int
) -> dict[str, Any]:
    """The content of `genai_config.json` for a decoder graph.

    Args:
        inputs: the inputs of the graph.
        config: transformers' configuration of the model.
        special: its special tokens.
        longest: the limit on tokens of prompt and answer together.
    """
    names = [spec.name for spec in inputs]
    key = next(spec for spec in inputs if spec.name.startswith(f"{PAST}."))
    kinds = ("key", "value")
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": GRAPH_FILE,
        "head_size": key.shape[3],
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": key.shape[1],
        "num_hidden_layers": sum(name.startswith(f"{PAST}.") for name in names) // len(kinds),
        "inputs": {name: name for name in _READ if name in names}
        | {f"past_{kind}_names": f"{PAST}.%d.{kind}" for kind in kinds},
        "outputs": {LOGITS: LOGITS}
        | {f"present_{kind}_names": f"{PRESENT}.%d.{kind}" for kind in kinds},
    }
    return {
        "model": {
            "type": _TYPE,
            "context_length": longest,
            "vocab_size": config.vocab_size,
            **_tokens(special),
            "decoder": decoder,
        },
        # Each step returns a longer cache; the other way is for graphs that write into a fixed one.
        "search": {"do_sample": False, "max_length": longest, "past_present_share_buffer": False},
    }


def _search(settings: GenerationSettings) -> dict[str, float]:
    """The generation settings of the model that the runtime applies as well, as numbers."""
    values = {name: settings.number(name) for name in _SEARCH}
    return {name: value for name, value in values.items() if value is not None}


def _check_fits(artifact: Artifact) -> None:
    manifest = artifact.manifest
    task = TASKS[manifest.task]
    if manifest.kind != "onnx":
        found = f"is of kind {manifest.kind}, expected an ONNX export"
        remedy = "Give the directory that `propulsion-export onnx` wrote."
    elif task.architecture != "decoder":
        found = f"is for {manifest.task}, expected text-generation: onnxruntime-genai runs that"
        if task.architecture == "encoder-decoder":
            found += ", and of encoder-decoders those of speech and Marian alone"
        remedy = "Serve it with ONNX Runtime itself."
    elif manifest.dtype == "bfloat16":
        found = "is in bfloat16, for which ONNX Runtime's CPU provider has no kernels"
        remedy = "Export with --dtype float32 or float16."
    else:
        return
    raise UsageError(f"{artifact.shown}: {found}", remedy=remedy)


def _tokens(special: SpecialTokens) -> dict[str, Any]:
    """The special tokens; the runtime needs a number for each, and masks padding by its number."""
    return {
        "bos_token_id": 0 if special.begin is None else special.begin,
        "eos_token_id": list(special.end),
        "pad_token_id": next(iter(special.end), 0) if special.pad is None else special.pad,
    }
