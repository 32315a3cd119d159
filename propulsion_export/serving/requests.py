"""Check the inputs of a request and bring them into the form that a model takes."""

from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.base_model.model_inputs import ExtraInput
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.data.messages import Conversation
from propulsion_export.data.rows import half_character, wrong_words
from propulsion_export.errors import UsageError

Text = str | Sequence[str]  # a text, or the words of one
Messages = Sequence[Mapping[str, Any]] | Conversation
Inputs = str | Sequence[Text] | Tensors | Sequence[Mapping[str, Any]] | Sequence[Messages]
_NONE: Mapping[str, ExtraInput] = {}
# Inputs with a number for every token of the text, [batch, sequence].
_OF_TOKENS = {"input_ids", "attention_mask", "token_type_ids"}


def check_inputs(inputs: Any) -> None:
    """Refuse what is neither texts in an order nor tensors by name.

    Raises:
        UsageError: naming its type.
    """
    in_order = isinstance(inputs, Collection) and not isinstance(inputs, bytes | bytearray | Set)
    if not in_order or (isinstance(inputs, np.ndarray) and inputs.ndim == 0):
        raise UsageError(
            f"the inputs are {type(inputs).__name__}, expected a text, a list of texts, or "
            "tensors by name"
        )


def count_rows(inputs: Inputs) -> int:
    """How many rows the inputs have; a text is one row.

    Raises:
        UsageError: there are none, or arrays have different numbers of rows.
    """
    if isinstance(inputs, str):
        return 1
    if isinstance(inputs, Mapping):
        shapes = {name: _as_array(name, values).shape for name, values in inputs.items()}
        counts = {shape[0] if shape else 0 for shape in shapes.values()} or {0}
        if len(counts) > 1:
            shown = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise UsageError(f"the inputs are {shown}, expected as many rows each")
    else:
        counts = {len(inputs)}
    if counts == {0}:
        raise UsageError("there are no rows, expected some")
    return counts.pop()


def check_texts(texts: Sequence[Text], task: str) -> None:
    """Refuse texts that no tokenizer can read.

    Raises:
        UsageError: naming every row that is no text, or holds half a character; or is a list of
            words, for another task than token classification.
    """
    findings: list[str] = []
    takes_words = TASKS[task].prediction == "word classes"
    for row, text in enumerate(texts, 1):
        if isinstance(text, list | tuple) and takes_words:
            findings += filter(None, [wrong_words(f"text {row}", text)])
        else:
            findings += filter(None, [_wrong_text(f"text {row}", text)])
    if findings:
        raise UsageError(*findings)


def one_each(what: str, given: str | Sequence[str], count: int) -> Sequence[str]:
    """One value for each of `count` rows; a single value is repeated.

    Args:
        what: the name of the values in the message.
        given: one value, or one for each row.
        count: the number of rows.

    Raises:
        UsageError: the number of values is neither 1 nor `count`.
    """
    if isinstance(given, str):
        return [given] * count
    if len(given) not in (1, count):
        raise UsageError(f"{len(given)} {what} for {count} rows, expected one, or one each")
    return given if len(given) == count else [given[0]] * count


def check_names(given: Any) -> None:
    """Refuse what is neither the name of an adapter nor a list of names.

    Raises:
        UsageError: naming every row that has no name.
    """
    if isinstance(given, str):
        return
    is_array = isinstance(given, np.ndarray) and given.ndim == 1
    if isinstance(given, bytes) or not (is_array or isinstance(given, Sequence)):
        raise UsageError(
            f"adapter: is {type(given).__name__}, expected a name, or a list of one for each row"
        )
    findings = [
        f"adapter {row}: is {type(name).__name__}, expected a name"
        for row, name in enumerate(given, 1)
        if not isinstance(name, str)
    ]
    if findings:
        raise UsageError(*findings)


def contexts_for(task: str, given: str | Sequence[str], rows: int) -> Sequence[str]:
    """The second text for each row: with the answer to a question, or of a pair to classify.

    Returns:
        A text for each row, or none at all; only question answering needs them.

    Raises:
        UsageError: a question has no context, or a task that reads single texts has one.
    """
    kind = TASKS[task].prediction
    if given:
        _check_contexts(given)
    if kind == "class" and given:
        return one_each("contexts", given, rows)
    if kind == "span":
        if not given:
            raise UsageError(
                f"{task}: no context is given, expected the text that holds the answer",
                remedy="Give it as context, on the command line with --context.",
            )
        return one_each("contexts", given, rows)
    if given:
        raise UsageError(
            f"context: is for question-answering or text-classification, the artifact is for {task}"
        )
    return ()


def _check_contexts(given: str | Sequence[str]) -> None:
    contexts = [given] if isinstance(given, str) else given
    if not isinstance(contexts, Sequence):
        raise UsageError(f"context: is {type(given).__name__}, expected texts")
    findings = [
        wrong
        for row, context in enumerate(contexts, 1)
        if (wrong := _wrong_text(f"context {row}", context))
    ]
    if findings:
        raise UsageError(*findings)


def _wrong_text(place: str, text: object) -> str | None:
    if not isinstance(text, str):
        return f"{place}: is {type(text).__name__}, expected a text"
    return half_character(f"{place}:", text)


def as_given(
    inputs: Tensors,
    needed: set[str],
    optional: set[str],
    extras: Mapping[str, ExtraInput] = _NONE,
) -> dict[str, Array]:
    """The tensors as the model takes them: int64, with zeros for missing `token_type_ids`.

    Args:
        inputs: what was given.
        needed: the inputs that a model must have.
        optional: the inputs that it may have too.
        extras: those of them that say more about a token, which may have more dimensions.

    Raises:
        UsageError: naming the inputs that are missing, unknown to the model, or of other
            dimensions or types.
    """
    given = {name: _as_array(name, values) for name, values in inputs.items()}
    if "input_ids" in given and "token_type_ids" in needed - given.keys():
        given["token_type_ids"] = np.zeros_like(given["input_ids"])
    for name in needed & extras.keys() - given.keys():
        if "input_ids" in given and extras[name].source == "zeros":
            given[name] = extras[name].zeros(given["input_ids"])
    if missing := needed - given.keys():
        raise UsageError(
            f"the inputs are {', '.join(inputs)}, expected {', '.join(sorted(missing))} besides"
        )
    known = needed | optional
    findings = [
        f"the input {name!r} is unknown, expected only {', '.join(sorted(known))}"
        for name in given
        if name not in known
    ]
    shapes = {name: extras[name].shape if name in extras else "[batch, sequence]" for name in known}
    findings += [
        f"{name}: is {values.dtype} {list(values.shape)}, expected whole numbers {shapes[name]}"
        for name, values in given.items()
        if name in known
        and (values.ndim != shapes[name].count(",") + 1 or values.dtype.kind not in "iub")
    ]
    findings += [
        f"{name}: has {values.min()}, expected no number below zero"
        for name, values in given.items()
        if name in known and values.size and values.dtype.kind == "i" and values.min() < 0
    ]
    tokens = [name for name in given if name in _OF_TOKENS or name in extras]
    if not findings and len({given[name].shape[:2] for name in tokens}) > 1:
        found = ", ".join(f"{name} {list(given[name].shape)}" for name in tokens)
        findings.append(f"the inputs are {found}, expected one shape")
    if findings:
        raise UsageError(*findings)
    return {name: values.astype(np.int64) for name, values in given.items()}


def _as_array(name: str, values: object) -> Array:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise UsageError(f"{name}: has rows of different lengths ({error})") from error
