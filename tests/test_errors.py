import copy
import pickle

import pytest

from propulsion_export import errors
from propulsion_export.errors import (
    AdapterError,
    ArtifactError,
    BaseModelError,
    DataError,
    InvalidInputError,
    PropulsionExportError,
    ToolError,
    UnavailableError,
    UnknownAdapterError,
    UsageError,
    VerificationError,
)

CODES = {
    PropulsionExportError: 4,
    UsageError: 2,
    UnknownAdapterError: 2,
    VerificationError: 1,
    UnavailableError: 3,
    InvalidInputError: 4,
    AdapterError: 4,
    ArtifactError: 4,
    BaseModelError: 4,
    DataError: 4,
    ToolError: 4,
}


@pytest.mark.parametrize(("kind", "code"), CODES.items(), ids=lambda item: str(item))
def test_each_class_carries_the_documented_exit_code(kind, code):
    assert kind("a: b").exit_code == code
    assert issubclass(kind, PropulsionExportError)


def test_every_error_class_is_in_the_table_above():
    defined = {
        item
        for item in vars(errors).values()
        if isinstance(item, type) and issubclass(item, Exception)
    }

    assert defined == set(CODES)


@pytest.mark.parametrize(
    "kind", [AdapterError, ArtifactError, BaseModelError, DataError, ToolError]
)
def test_what_was_handed_in_is_caught_as_one_family(kind):
    assert issubclass(kind, InvalidInputError)
    assert not issubclass(UsageError, InvalidInputError)
    assert not issubclass(UnavailableError, InvalidInputError)


def test_findings_and_remedy_become_one_line():
    error = AdapterError("a: found 1", "b: found\n  2", remedy="Do\nthis.")

    assert str(error) == "a: found 1; b: found 2. Do this."
    assert error.findings == ("a: found 1", "b: found\n  2")
    assert error.remedy == "Do\nthis."


@pytest.mark.parametrize(
    ("finding", "remedy", "expected"),
    [
        ("a: b", "", "a: b"),
        ("a: b", "Do this.", "a: b. Do this."),
        ("a: b.", "Do this.", "a: b. Do this."),
        ("a: b?", "Do this.", "a: b? Do this."),
        ("", "Do this.", "Do this."),
    ],
)
def test_the_remedy_is_a_sentence_of_its_own(finding, remedy, expected):
    assert str(UsageError(*filter(None, [finding]), remedy=remedy)) == expected


def test_many_findings_are_counted_and_all_kept():
    findings = [f"m{index}: wrong" for index in range(7)]
    error = AdapterError(*findings, remedy="Fix it.")

    assert str(error) == "m0: wrong; m1: wrong; m2: wrong; m3: wrong; and 3 more. Fix it."
    assert list(error.findings) == findings


def test_exactly_four_findings_are_all_shown():
    assert "more" not in str(AdapterError("a", "b", "c", "d"))


@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_an_error_from_another_process_says_the_same(again):
    error = UsageError("a: b", "c: d", remedy="Do this.")

    other = again(error)

    assert type(other) is UsageError
    assert (other.findings, other.remedy, str(other)) == (error.findings, error.remedy, str(error))
