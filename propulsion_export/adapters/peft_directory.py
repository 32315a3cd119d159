"""Read and check a PEFT adapter directory of Propulsion or (IA)^3.

The power z**k is computed here, once, in float64. Nothing is unpickled.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from propulsion_export.adapters.scales import Array, Scale, Side
from propulsion_export.adapters.wrapped_modules import unwrapped
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.settings import wrong_model_settings, wrong_tokenizer_settings
from propulsion_export.environment.hub_files import refuse_pointers
from propulsion_export.environment.permissions import check_permission
from propulsion_export.errors import AdapterError

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
VECTOR_SUFFIX = ".propulsion_z"
BIAS_SUFFIX = ".propulsion_bias"
IA3_SUFFIX = ".ia3_l"
FROZEN = ".base_layer."  # the part of the name of a scaled module's own parameters

# Far above every usable degree: a power this large overflows or vanishes.
_LARGEST_DEGREE = 2**53


@dataclass(frozen=True)
class PeftDirectory:
    """The content of the directory; `Adapter` describes each field."""

    scales: Mapping[str, Scale]
    biases: Mapping[str, Array]
    modules: Mapping[str, Array]
    frozen: Mapping[str, tuple[int, ...]]
    base: str | None
    fingerprint: Fingerprint | None
    task_type: str
    labels: tuple[str, ...] | None
    model_settings: Mapping[str, Any]
    tokenizer_settings: Mapping[str, Any]


def read_peft_directory(directory: Path) -> PeftDirectory:
    """Read a directory that PEFT's `save_pretrained` wrote.

    Raises:
        AdapterError: something is missing, damaged, of the wrong shape or not finite; the adapter
            is of another method, or only a pickle.
    """
    refuse_pointers((directory / name for name in (PEFT_CONFIG, PEFT_WEIGHTS)), AdapterError)
    config = _read_config(directory)
    tensors = _read_tensors(directory)
    kind = config.get("peft_type")
    if kind not in ("PROPULSION", "IA3"):
        raise AdapterError(
            f"{directory / PEFT_CONFIG}: peft_type is {_short(kind)}, expected "
            "'PROPULSION' or 'IA3'",
            remedy="Other methods are not element-wise scales and cannot be exported by this tool.",
        )
    read_scales = _propulsion_scales if kind == "PROPULSION" else _ia3_scales
    scales, rest = read_scales(directory, config, tensors)
    if not scales:
        raise AdapterError(
            f"{directory / PEFT_WEIGHTS}: holds no scale, expected one for each module"
        )
    _check_complete(directory, config, scales)
    _check_settings(directory, config)
    rest = unwrapped(directory / PEFT_WEIGHTS, rest)
    biases = _strip(rest, BIAS_SUFFIX)
    _check_finite(directory, rest)
    _check_biases(directory, scales, biases)
    return PeftDirectory(
        scales=scales,
        biases=biases,
        modules={
            key.removeprefix(PREFIX): values
            for key, values in rest.items()
            # PEFT also saves a copy of a frozen embedding that is a target.
            if not key.endswith(BIAS_SUFFIX) and FROZEN not in key
        },
        frozen={
            key.removeprefix(PREFIX).replace(FROZEN, "."): values.shape
            for key, values in rest.items()
            if FROZEN in key
        },
        base=_base(directory, config),
        fingerprint=_fingerprint(directory, config),
        task_type=str(config.get("task_type")),
        labels=_labels(directory, config),
        model_settings=config.get("model_settings") or {},
        tokenizer_settings=config.get("tokenizer_settings") or {},
    )


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / PEFT_CONFIG
    if not os.path.isfile(file):  # noqa: PTH113 - never raises, whatever the path
        check_permission(directory, AdapterError)
        raise AdapterError(
            f"{directory}: has no {PEFT_CONFIG}, expected a PEFT adapter directory",
            remedy="`propulsion-export train` writes one.",
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file}: is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{file}: holds a {type(config).__name__}, expected an object")
    return config


def _read_tensors(directory: Path) -> dict[str, Array]:
    file = directory / PEFT_WEIGHTS
    if not file.is_file():
        pickled = (directory / "adapter_model.bin").exists()
        raise AdapterError(
            f"{directory}: has no {PEFT_WEIGHTS}"
            + (", only a pickle, which could run code and is not read" if pickled else ""),
            remedy="Save the adapter with PEFT's save_pretrained, which writes safetensors.",
        )
    # Registers bfloat16 with numpy, so that safetensors can load it.
    import ml_dtypes  # noqa: F401

    try:
        tensors = dict(load_file(file))
    except (SafetensorError, OSError, ValueError) as error:
        check_permission(file, AdapterError)
        raise AdapterError(
            f"{file}: is truncated or damaged ({error})", remedy="Copy or save it again."
        ) from error
    except (AttributeError, TypeError, KeyError) as error:  # what safetensors raises for float8
        raise AdapterError(
            f"{file}: holds a dtype that numpy does not have ({error})",
            remedy="Save the adapter in float32, float16 or bfloat16.",
        ) from error
    _check_keys(file, tensors)
    return tensors


def _check_keys(file: Path, tensors: Mapping[str, Array]) -> None:
    strangers = [
        f"{file}: has the key {key!r}, expected one that starts with {PREFIX!r}"
        for key in tensors
        if not key.startswith(PREFIX)
    ]
    if strangers:
        raise AdapterError(
            *strangers, remedy="Save the adapter with PEFT's save_pretrained, which names them."
        )


def _propulsion_scales(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Array]
) -> tuple[dict[str, Scale], dict[str, Array]]:
    degree = _degree(directory, config)
    vectors = _strip(tensors, VECTOR_SUFFIX)
    _check_vectors(directory, vectors, experts=True)
    if not degree.is_integer():
        negative = [path for path, vector in vectors.items() if (vector < 0).any()]
        if negative:
            raise AdapterError(
                *(
                    f"{path}: a vector below zero has no real power {degree}, expected z >= 0"
                    for path in negative
                )
            )
    with np.errstate(over="ignore"):
        powers = {path: vector.astype(np.float64) ** degree for path, vector in vectors.items()}
    beyond = [
        f"{directory / PEFT_WEIGHTS}: {path} holds a vector whose power {degree:g} "
        "overflows float64"
        for path, values in powers.items()
        if not np.isfinite(values).all()
    ]
    if beyond:
        raise AdapterError(*beyond, remedy="The training diverged; train again with a lower rate.")
    scales = {path: Scale(values) for path, values in powers.items()}
    rest = {key: values for key, values in tensors.items() if not key.endswith(VECTOR_SUFFIX)}
    return scales, rest


def _degree(directory: Path, config: Mapping[str, Any]) -> float:
    degree: Any = config.get("degree")
    number = isinstance(degree, int | float) and not isinstance(degree, bool)
    # Compared before it is converted: JSON may hold integers beyond float64, NaN and Infinity.
    if not number or not 0 < degree < _LARGEST_DEGREE:
        raise AdapterError(
            f"{directory / PEFT_CONFIG}: degree is {_short(degree)}, expected a positive number"
        )
    return float(degree)


def _short(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, int) and abs(value) > _LARGEST_DEGREE:
        return "a huge number"  # Python refuses to print integers of many digits
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}…"


def _ia3_scales(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Array]
) -> tuple[dict[str, Scale], dict[str, Array]]:
    # One dimension counts the channels and the others are 1, for every class of layer.
    flat = {
        path: vector.reshape(-1) if vector.size in vector.shape else vector
        for path, vector in _strip(tensors, IA3_SUFFIX).items()
    }
    _check_vectors(directory, flat)
    _check_feedforward(directory, config)
    scales = {
        path: Scale(vector.astype(np.float64), _ia3_side(path, config))
        for path, vector in flat.items()
    }
    rest = {key: values for key, values in tensors.items() if not key.endswith(IA3_SUFFIX)}
    return scales, rest


def _ia3_side(path: str, config: Mapping[str, Any]) -> Side:
    """PEFT matches `feedforward_modules` by regex when it is one string, else by ending."""
    feedforward = config.get("feedforward_modules") or []
    if isinstance(feedforward, str):
        return "input" if re.fullmatch(feedforward, path) else "output"
    return "input" if any(path.endswith(target) for target in feedforward) else "output"


def _check_feedforward(directory: Path, config: Mapping[str, Any]) -> None:
    feedforward = config.get("feedforward_modules") or []
    file = directory / PEFT_CONFIG
    if isinstance(feedforward, str):
        try:
            re.compile(feedforward)
        except re.error as error:
            raise AdapterError(
                f"{file}: feedforward_modules is not a regular expression ({error})"
            ) from error
    elif not _is_names(feedforward):
        raise AdapterError(f"{file}: feedforward_modules is not a list of names")


def _check_complete(
    directory: Path, config: Mapping[str, Any], scales: Mapping[str, Scale]
) -> None:
    """Refuse an adapter that lost a vector: its layer would be unscaled without any sign of it."""
    expected = config.get("scaled_modules")
    if expected is not None and expected != len(scales):
        raise AdapterError(
            f"{directory / PEFT_WEIGHTS}: holds vectors for {len(scales)} modules, expected "
            f"{_short(expected)} by {PEFT_CONFIG}",
            remedy="Copy or save the adapter again.",
        )


def _check_settings(directory: Path, config: Mapping[str, Any]) -> None:
    wrong = [
        *wrong_model_settings(config.get("model_settings")),
        *wrong_tokenizer_settings(config.get("tokenizer_settings")),
    ]
    if wrong:
        raise AdapterError(
            *(f"{directory / PEFT_CONFIG}: {finding}" for finding in wrong),
            remedy="Was it written by a newer version?",
        )


def _strip(tensors: Mapping[str, Array], suffix: str) -> dict[str, Array]:
    return {
        key.removeprefix(PREFIX).removesuffix(suffix): values
        for key, values in tensors.items()
        if key.endswith(suffix)
    }


def _check_vectors(directory: Path, vectors: Mapping[str, Array], *, experts: bool = False) -> None:
    dimensions, expected = ((1, 2), "one dimension or two") if experts else ((1,), "one dimension")
    wrong = [
        f"{path}: the vector has shape {list(vector.shape)}, expected {expected}"
        for path, vector in vectors.items()
        if vector.ndim not in dimensions or vector.size == 0
    ]
    if wrong:
        raise AdapterError(*(f"{directory / PEFT_WEIGHTS}: {finding}" for finding in wrong))
    _check_finite(directory, vectors)


def _check_finite(directory: Path, tensors: Mapping[str, Array]) -> None:
    bad = [
        f"{directory / PEFT_WEIGHTS}: {key} holds {int((~np.isfinite(values)).sum())} entries "
        "that are NaN or infinite, expected finite numbers"
        for key, values in tensors.items()
        if not np.isfinite(values.astype(np.float64)).all()
    ]
    if bad:
        raise AdapterError(*bad, remedy="The training diverged; train again with a lower rate.")


def _check_biases(
    directory: Path, scales: Mapping[str, Scale], biases: Mapping[str, Array]
) -> None:
    wrong = [
        f"{directory / PEFT_WEIGHTS}: {path} has a bias of shape {list(bias.shape)}, expected "
        f"{list(scales[path].values.shape)}"
        if path in scales
        else f"{directory / PEFT_WEIGHTS}: {path} has a trained bias but no scale"
        for path, bias in biases.items()
        if path not in scales or bias.shape != scales[path].values.shape
    ]
    if wrong:
        raise AdapterError(*wrong)


def _fingerprint(directory: Path, config: Mapping[str, Any]) -> Fingerprint | None:
    value = config.get("base_fingerprint")
    if value is None:
        return None
    try:
        return Fingerprint.from_json(value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(
            f"{directory / PEFT_CONFIG}: base_fingerprint is damaged ({error!r})"
        ) from error


def _labels(directory: Path, config: Mapping[str, Any]) -> tuple[str, ...] | None:
    labels = config.get("labels")
    if labels is None:
        return None
    if not _is_names(labels):
        raise AdapterError(f"{directory / PEFT_CONFIG}: labels is not a list of names")
    return tuple(labels)


def _base(directory: Path, config: Mapping[str, Any]) -> str | None:
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise AdapterError(
            f"{directory / PEFT_CONFIG}: base_model_name_or_path is {_short(base)}, expected a name"
        )
    return base


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
