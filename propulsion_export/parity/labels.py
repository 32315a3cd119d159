"""The case `labels`: names of classes, and what logits mean, as the base and the adapters say."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.adapters.settings import problem_type_of
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.layout import labels_in
from propulsion_export.base_model.config import read_settings
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.settings import SINGLE_LABEL, ProblemType, problem_type_in
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.parity.reports.report import Check


def check_labels(
    artifact: Artifact, adapters: Sequence[Adapter], base: BaseModel
) -> Iterator[Check]:
    """Check every adapter that has classes, and the base model where it has a head of its own."""
    entries, manifest = artifact.list_adapters(), artifact.manifest
    recorded = manifest.base
    classifies = TASKS[manifest.task].prediction == "class"
    own_type = problem_type_in(base.model.config) if classifies else None
    for adapter in adapters:
        entry = entries[adapter.name]
        expected = labels_in(
            adapter,
            manifest.layout,
            base.own_labels if recorded.own_head and recorded.labels else recorded.labels,
            base.room if recorded.own_head else None,
        )
        if expected is None and entry.labels is None:
            continue
        types = {problem_type_of(adapter, own_type)}
        if not recorded.own_head:  # the first adapter's
            types.add(problem_type_of(adapter, recorded.problem_type))
        findings = [*_names(entry.labels, expected, "the adapter")]
        if classifies:
            findings += _types(entry.problem_type, types)
        if manifest.mode == "folded":  # with several adapters it names the base model's classes
            findings += _in_configuration(artifact, expected)
            findings += _numbers(artifact, base.model.config.to_dict())
        if classifies:
            written = types if manifest.mode == "folded" else {recorded.problem_type}
            findings += _type_in_configuration(artifact, written)
        yield _check(adapter.name, findings, "the artifact names the classes as the adapter does")
    if (
        recorded.labels
        and recorded.own_head
        and base.label_parameters
        and not (manifest.mode == "folded" and adapters)
    ):
        findings = [*_names(recorded.labels, base.own_labels, "the base model")]
        findings += _in_configuration(artifact, base.own_labels)
        findings += _numbers(artifact, base.model.config.to_dict())
        if classifies:
            findings += _types(recorded.problem_type, {own_type})
        yield _check(BASE_NAME, findings, "the artifact names the classes as the base model does")


def _check(adapter: str, findings: Sequence[str], right: str) -> Check:
    return Check("labels", adapter, not findings, "; ".join(findings) or right)


def _names(
    found: Sequence[str] | None, expected: Sequence[str] | None, whose: str
) -> Iterator[str]:
    if found != expected:
        yield f"the artifact names the classes {found}, {whose} {expected}"


def _types(found: ProblemType | None, expected: Collection[ProblemType | None]) -> list[str]:
    """What is wrong with a problem type; none is that of classes that exclude each other."""
    if (found or SINGLE_LABEL) in {each or SINGLE_LABEL for each in expected}:
        return []
    named = " or ".join(sorted(each or SINGLE_LABEL for each in expected))
    return [f"the artifact takes the logits for {found or SINGLE_LABEL}, expected {named}"]


def _type_in_configuration(
    artifact: Artifact, expected: Collection[ProblemType | None]
) -> list[str]:
    """What transformers' pipelines, which take it from config.json, make otherwise of logits."""
    found = read_settings(artifact.directory).get("problem_type")
    if not found:  # then it follows from the number of classes
        return []
    return [f"config.json: {words}" for words in _types(found, expected)]


def _in_configuration(artifact: Artifact, expected: Sequence[str] | None) -> Iterator[str]:
    """What config.json, which other programs read, names otherwise."""
    names = read_settings(artifact.directory).get("id2label")
    if not expected or not isinstance(names, dict):
        return
    found = tuple(names[number] for number in sorted(names, key=int))
    if found[: len(expected)] != tuple(expected):
        yield f"config.json names the classes {found}, expected {tuple(expected)}"


def _numbers(artifact: Artifact, of_base: Mapping[str, Any]) -> Iterator[str]:
    """Whether config.json numbers classes in two ways, and the base model's does not."""
    settings = read_settings(artifact.directory)
    if _is_numbered_twice(settings) and not _is_numbered_twice(of_base):
        yield f"config.json numbers the classes {settings['label2id']} in label2id, not in id2label"


def _is_numbered_twice(settings: Mapping[str, Any]) -> bool:
    names, numbers = settings.get("id2label"), settings.get("label2id")
    if not isinstance(names, dict) or not isinstance(numbers, dict):
        return False
    by_number = {str(number): name for number, name in names.items()}
    return any(by_number.get(str(number)) != name for name, number in numbers.items())
