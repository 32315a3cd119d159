"""Mistakes in the files around a graph: labels, tokenizer, pooling, configuration, bytes."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import onnx_ir as ir

from mutation.mistakes import Family, Place, Places
from mutation.planted import Copy
from propulsion_export.artifacts.file_names import WEIGHTS_FILE

FILES = Family("files", everywhere=True)


def _where(file: str, setting: str | None = None) -> Places:
    """The file, if there is one, and it has the setting."""

    def places(copy: Copy) -> Iterator[Place]:
        found = copy.read_json(file)
        if found and (setting is None or found.get(setting) is not None):
            yield file, setting

    return places


def _set(
    name: str, file: str, setting: str, change: Callable[[Any], Any], *, merged: bool = False
) -> None:
    """A kind for a setting; `merged`: one that only the model of a checkpoint reads."""
    find = _where(file, setting)

    @FILES.kind(
        name,
        lambda copy: find(copy) if copy.manifest.kind == "merged" or not merged else [],
        in_files=True,
    )
    def plant_(copy: Copy, place: Place) -> None:
        copy.change_json(file, **{setting: change(copy.read_json(file)[setting])})


def _labelled(copy: Copy) -> Iterator[Place]:
    for name, entry in copy.artifact.list_adapters().items():
        if entry.labels:
            yield (name,)


@FILES.kind("labels in another order", _labelled, in_files=True)
def labels(copy: Copy, place: Place) -> None:
    found = copy.artifact.list_adapters()[place[0]].labels
    copy.set_entry(place[0], labels=(*found[1:], found[0]))


@FILES.kind("a label with another name", _labelled, in_files=True)
def label(copy: Copy, place: Place) -> None:
    found = copy.artifact.list_adapters()[place[0]].labels
    copy.set_entry(place[0], labels=("other", *found[1:]))


@FILES.kind("another problem type", _labelled, in_files=True)
def problem_type(copy: Copy, place: Place) -> None:
    copy.set_entry(place[0], problem_type="multi_label_classification")


def _base_labelled(copy: Copy) -> list[Place]:
    named = copy.manifest.base.labels is not None and copy.manifest.mode != "folded"
    return [("base",)] if named else []


@FILES.kind("the base model's labels in another order", _base_labelled, in_files=True)
def base_labels(copy: Copy, place: Place) -> None:
    base = copy.manifest.base
    found = base.labels
    copy.manifest = replace(copy.manifest, base=replace(base, labels=(*found[1:], found[0])))


def _reordered(names: dict[str, str]) -> dict[str, str]:
    first, *rest = names.values()
    return dict(zip(names, [*rest, first], strict=True))


_set("labels of config.json in another order", "config.json", "id2label", _reordered)
_set("another padding token", "config.json", "pad_token_id", lambda token: token + 1)
_set(
    "another first token of the decoder",
    "config.json",
    "decoder_start_token_id",
    lambda token: token + 2,
)
_set("another end of generated text", "generation_config.json", "eos_token_id", lambda token: 17)
for _name, _setting, _change in (
    ("a checkpoint's epsilon", "layer_norm_eps", lambda value: 1e-3),
    ("a checkpoint's epsilon (RMS)", "rms_norm_eps", lambda value: 1e-3),
    ("a checkpoint's activation", "hidden_act", lambda value: "relu"),
    ("a checkpoint's activation (BART)", "activation_function", lambda value: "relu"),
    ("a checkpoint's number of heads", "num_attention_heads", lambda value: value // 2),
    ("a checkpoint's number of heads (BART)", "decoder_attention_heads", lambda value: value // 2),
    ("a checkpoint's layers", "num_hidden_layers", lambda value: value - 1),
    ("a checkpoint's embedding scale", "scale_embedding", lambda value: not value),
    ("a checkpoint's rotary base", "rope_parameters", lambda value: {**value, "rope_theta": 2.0e4}),
):
    _set(f"{_name} changed", "config.json", _setting, _change, merged=True)

_TOKENIZER = "tokenizer.json"


def _tokenizer(name: str, change_: Callable[[dict[str, Any]], None]) -> None:
    @FILES.kind(name, _where(_TOKENIZER), in_files=True)
    def plant_(copy: Copy, place: Place) -> None:
        settings = copy.read_json(_TOKENIZER)
        change_(settings)
        (copy.directory / _TOKENIZER).write_text(json.dumps(settings))


def _words_exchanged_(settings: dict[str, Any]) -> None:
    words = settings["model"]["vocab"]
    words["ba"], words["ci"] = words["ci"], words["ba"]


def _case_kept_(settings: dict[str, Any]) -> None:
    settings["normalizer"] = None


def _special_lost_(settings: dict[str, Any]) -> None:
    settings["post_processor"] = None


def _special_exchanged_(settings: dict[str, Any]) -> None:
    for token in settings["post_processor"]["special_tokens"].values():
        token["ids"] = [{2: 3, 3: 2}.get(each, each) for each in token["ids"]]


def _word_lost_(settings: dict[str, Any]) -> None:
    words = settings["model"]["vocab"]
    words["lost"] = words.pop("de")


_tokenizer("two words of the tokenizer exchanged", _words_exchanged_)
_tokenizer("a tokenizer that keeps case", _case_kept_)
_tokenizer("a tokenizer without special tokens", _special_lost_)
_tokenizer("special tokens of the tokenizer exchanged", _special_exchanged_)
_tokenizer("a word of the tokenizer lost", _word_lost_)
_set(
    "a tokenizer that pads with another token",
    "tokenizer_config.json",
    "pad_token",
    lambda _: "[UNK]",
)
_set("texts cut at 8 tokens", "tokenizer_config.json", "model_max_length", lambda _: 8)


@FILES.kind("another pooling", _where("1_Pooling/config.json"), in_files=True)
def pooling(copy: Copy, place: Place) -> None:
    file = place[0]
    copy.change_json(file, pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)


@FILES.kind("embeddings not normalised", _where("1_Pooling/config.json"), in_files=True)
def not_normalised(copy: Copy, place: Place) -> None:
    path = copy.directory / "modules.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:2]))


@FILES.kind("no sentence pipeline", _where("1_Pooling/config.json"), in_files=True)
def no_pooling(copy: Copy, place: Place) -> None:
    (copy.directory / "modules.json").unlink()


def _single(copy: Copy) -> list[Place]:
    return [(next(iter(copy.graphs)),)] if len(copy.graphs) == 1 else []


def _externally_(copy: Copy, place: Place, change: Callable[[bytes], bytes]) -> None:
    """Move all weights of a graph to a file beside it, whose bytes are then changed."""
    model = copy.graphs.pop(place[0])
    ir.save(model, copy.directory / place[0], external_data=WEIGHTS_FILE, size_threshold_bytes=256)
    data = copy.directory / WEIGHTS_FILE
    data.write_bytes(change(data.read_bytes()))


@FILES.kind("the weights' file cut", _single)
def cut(copy: Copy, place: Place) -> None:
    _externally_(copy, place, lambda data: data[: len(data) * 3 // 4])


@FILES.kind("the end of the weights' file lost", _single)
def zeros(copy: Copy, place: Place) -> None:
    _externally_(
        copy, place, lambda data: data[: len(data) * 3 // 4] + bytes(len(data) - len(data) * 3 // 4)
    )


@FILES.kind("the weights' file shifted by an element", _single)
def shifted(copy: Copy, place: Place) -> None:
    _externally_(copy, place, lambda data: bytes(4) + data[:-4])


@FILES.kind("a bit of the weights' file flipped", _single)
def bit(copy: Copy, place: Place) -> None:
    def flipped(data: bytes) -> bytes:
        at = len(data) // 2 | 3  # the byte of the sign and of the exponent
        return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]

    _externally_(copy, place, flipped)


def _alike_slots(copy: Copy) -> Iterator[Place]:
    for packed, slots in copy.manifest.layout.items():
        for one, other in pairwise(slots):
            if one.shape == other.shape:
                yield packed, one.path, other.path
                break


@FILES.kind("two slots of the layout exchanged", _alike_slots)
def slots(copy: Copy, place: Place) -> None:
    packed, one, other = place
    layout = dict(copy.manifest.layout)
    names = {one: other, other: one}
    layout[packed] = tuple(replace(s, path=names.get(s.path, s.path)) for s in layout[packed])
    copy.manifest = replace(copy.manifest, layout=layout)
