"""The case `labels`: names of classes, and what logits mean, as the base and the adapters say."""

from collections.abc import Collection, Iterator, Sequence

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
        yield _check(adapter.name, findings, "the artifact names the classes as the adapter does")
    if (
        recorded.labels
        and recorded.own_head
        and base.label_parameters
        and not (manifest.mode == "folded" and adapters)
    ):
        findings = [*_names(recorded.labels, base.own_labels, "the base model")]
        findings += _in_configuration(artifact, base.own_labels)
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


def _in_configuration(artifact: Artifact, expected: Sequence[str] | None) -> Iterator[str]:
    """What config.json, which other programs read, names otherwise."""
    names = read_settings(artifact.directory).get("id2label")
    if not expected or not isinstance(names, dict):
        return
    found = tuple(names[number] for number in sorted(names, key=int))
    if found[: len(expected)] != tuple(expected):
        yield f"config.json names the classes {found}, expected {tuple(expected)}"
