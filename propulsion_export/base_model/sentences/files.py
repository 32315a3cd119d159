"""Read the pipeline of a sentence-transformers model from its files."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from propulsion_export.base_model.config import read_settings_file
from propulsion_export.base_model.sentences.modules import (
    PICKLED_FILE,
    SETTINGS_FILE,
    TRANSFORMER_FILES,
    WEIGHTS_FILE,
    Module,
    find_in,
    list_modules,
)
from propulsion_export.base_model.sentences.pipeline import (
    ACTIVATIONS,
    MODES,
    SENTENCE,
    TOKENS,
    Array,
    Dense,
    LayerNorm,
    Normalize,
    Pooling,
    SentencePipeline,
    Step,
)
from propulsion_export.errors import BaseModelError

# Settings of the transformer that change no embedding, or that are read here.
_READ_SETTINGS = frozenset(
    {
        "max_seq_length",
        "do_lower_case",
        "transformer_task",
        "modality_config",
        "module_output_name",
        "unpad_inputs",
        "query_length",
        "document_length",
        "query_expansion",
    }
)
# Arguments of loading that change precision or speed only.
_HARMLESS = frozenset(
    {"add_pooling_layer", "attn_implementation", "dtype", "low_cpu_mem_usage", "torch_dtype"}
    | {"trust_remote_code", "use_cache"}
)
_ARGUMENTS = ("model", "tokenizer", "processor", "config")
_FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}


def read_sentence_pipeline(source: str | Path) -> SentencePipeline | None:
    """The pipeline of a base model, an adapter or an artifact; None without `modules.json`.

    Args:
        source: a directory, or a name on a hub.

    Raises:
        BaseModelError: it is not computed here: another kind of module, weights that are pickled
            only, settings that change how texts are read; or its files are damaged.
        ArtifactError: a file is no JSON object.
    """
    find = find_in(source)
    modules = list_modules(str(source), find)
    if modules is None:
        return None
    transformer, *behind = modules
    settings = _transformer_settings(transformer)
    steps = tuple(step for module in behind for step in _step(module))
    if not any(isinstance(step, Pooling) for step in steps):
        raise BaseModelError(f"{source}: modules.json names no Pooling, expected one")
    _check_widths(str(source), steps, _width(transformer))
    whole = read_settings_file(found) if (found := find(SETTINGS_FILE)) else {}
    _check_type(str(source), whole)
    return SentencePipeline(
        steps,
        longest=settings.get("max_seq_length"),
        lower_case=bool(settings.get("do_lower_case")),
        prompt=_default_prompt(str(source), whole),
        dimensions=whole.get("truncate_dim"),
    )


def _transformer_settings(module: Module) -> dict[str, Any]:
    """The transformer's settings, after refusing those that change what it computes."""
    name = next((name for name in TRANSFORMER_FILES if module.file(name)), TRANSFORMER_FILES[0])
    settings = module.settings(name)
    arguments = {f"{part}_{end}" for part in _ARGUMENTS for end in ("args", "kwargs")}
    wrong = [
        f"{name}: {key}.{inner}"
        for key in sorted(arguments & settings.keys())
        for inner in (settings[key] or {})
        if inner not in _HARMLESS
    ]
    unknown = settings.keys() - _READ_SETTINGS - arguments
    wrong += [f"{name}: {key}" for key in sorted(unknown) if settings[key]]
    modality = settings.get("modality_config", {"text": _FORWARD}).get("text")
    if (
        settings.get("transformer_task", "feature-extraction") != "feature-extraction"
        or settings.get("module_output_name", TOKENS) != TOKENS
        or modality != _FORWARD
    ):
        wrong.append(f"{name}: an output other than the last hidden state of a text")
    longest = settings.get("max_seq_length")
    if longest is not None and (not isinstance(longest, int) or longest < 1):
        wrong.append(f"{name}: max_seq_length {longest!r}")
    if wrong:
        raise BaseModelError(
            *(f"{module.source}: {finding} is set, which is not computed here" for finding in wrong)
        )
    return settings


def _step(module: Module) -> Iterator[Step]:
    """The module as a step; nothing for one that does nothing when it predicts."""
    match module.kind:
        case "Pooling":
            yield _pooling(module)
        case "Dense":
            yield _dense(module)
        case "LayerNorm":
            weights = _weights(module)
            yield LayerNorm(*(_named(module, weights, f"norm.{n}") for n in ("weight", "bias")))
        case "Normalize":
            yield Normalize(*_ends(module, module.settings()))
        case "Dropout":
            return
        case _:
            raise BaseModelError(
                f"{module.source}: modules.json names {module.kind}, expected Pooling, Dense, "
                "LayerNorm, Normalize or Dropout behind the Transformer",
                remedy="Remove modules.json from a copy of it to export the token vectors alone.",
            )


def _pooling(module: Module) -> Pooling:
    settings = _own_settings(module)
    given = settings.get("pooling_mode")
    if given is None:  # older files have a switch for each mode
        given = [mode for mode in MODES if settings.get(_switch(mode))] or ["mean"]
    modes = (given,) if isinstance(given, str) else tuple(given)
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise BaseModelError(
            f"{module.where}: pools by {', '.join(map(str, unknown))}, expected {', '.join(MODES)}"
        )
    return Pooling(modes, bool(settings.get("include_prompt", True)))


def _own_settings(module: Module) -> dict[str, Any]:
    if module.file("config.json") is None:
        raise BaseModelError(f"{module.where}: has no config.json")
    return module.settings()


def _switch(mode: str) -> str:
    ending = "" if mode in ("mean_sqrt_len_tokens", "lasttoken") else "_token"
    plural = "s" if mode in ("max", "mean", "weightedmean") else ""
    return f"pooling_mode_{mode}{ending}{plural}"


def _dense(module: Module) -> Dense:
    settings = _own_settings(module)
    reference = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = reference.rpartition(".")[2]
    if not reference.startswith("torch.nn.") or activation not in ACTIVATIONS:
        raise BaseModelError(
            f"{module.where}: has the activation {reference}, expected {', '.join(ACTIVATIONS)}"
        )
    weights = _weights(module)
    weight = _named(module, weights, "linear.weight")
    bias = _named(module, weights, "linear.bias") if settings.get("bias", True) else None
    residual = None
    if settings.get("use_residual"):
        square = weight.shape[0] == weight.shape[1]
        residual = np.eye(len(weight)) if square else _named(module, weights, "residual.weight")
    return Dense(weight, bias, activation, *_ends(module, settings), residual=residual)


def _ends(module: Module, settings: Mapping[str, Any]) -> tuple[str, str]:
    """The vectors that a module reads and writes."""
    source = settings.get("module_input_name") or SENTENCE
    ends = (str(source), str(settings.get("module_output_name") or source))
    if not set(ends) <= {TOKENS, SENTENCE} or ends == (TOKENS, SENTENCE):
        raise BaseModelError(
            f"{module.where}: reads {ends[0]} and writes {ends[1]}, expected {TOKENS} or {SENTENCE}"
        )
    return ends


def _weights(module: Module) -> dict[str, Array]:
    file = module.file(WEIGHTS_FILE)
    if file is None:
        pickled = module.file(PICKLED_FILE) is not None
        found = f"has {PICKLED_FILE} only, which may run code" if pickled else "has no weights"
        raise BaseModelError(
            f"{module.where}: {found}, expected {WEIGHTS_FILE}",
            remedy="Load it in sentence-transformers and save it again." if pickled else "",
        )
    import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return {name: values.astype(np.float64) for name, values in load_file(file).items()}
    except (SafetensorError, OSError, AttributeError, TypeError, KeyError) as error:
        raise BaseModelError(f"{file}: cannot be read ({error})") from error


def _named(module: Module, weights: Mapping[str, Array], name: str) -> Array:
    if name not in weights:
        raise BaseModelError(f"{module.where}: has no {name}, only {', '.join(weights)}")
    return weights[name]


def _width(transformer: Module) -> int | None:
    """The width of the token vectors; None where there is no config.json, as for an adapter."""
    settings = transformer.settings()
    found = (settings.get(name) for name in ("hidden_size", "d_model", "dim", "n_embd"))
    return next((width for width in found if isinstance(width, int)), None)


def _check_widths(source: str, steps: Sequence[Step], width: int | None) -> None:
    """Refuse a Dense or LayerNorm that does not fit the one before it."""
    for step in steps:
        given = getattr(step, "weight", None)
        if isinstance(step, Pooling) and width is not None:
            width *= len(step.modes)
        if given is None:
            continue
        if width is not None and given.shape[-1] != width:
            raise BaseModelError(
                f"{source}: {step.label} takes {given.shape[-1]} numbers, expected {width}, what "
                "the module before it has"
            )
        width = len(given)


def _check_type(source: str, settings: Mapping[str, Any]) -> None:
    kind = settings.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise BaseModelError(
            f"{source}: {SETTINGS_FILE} says {kind}, expected a SentenceTransformer, which gives "
            "one vector for each text"
        )


def _default_prompt(source: str, settings: Mapping[str, Any]) -> str:
    name = settings.get("default_prompt_name")
    if name is None:
        return ""
    prompt = (settings.get("prompts") or {}).get(name)
    if not isinstance(prompt, str):
        raise BaseModelError(
            f"{source}: {SETTINGS_FILE} names the prompt {name!r}, which it does not have"
        )
    return prompt
