"""What may be replaced, and what is refused before anything is written."""

import functools
from pathlib import Path

import pytest
from outputs import ADAPTER, content_of, ours, refused

from propulsion_export.artifacts.staging import (
    MARKERS,
    check_replaceable,
    replace_file,
    staged_directory,
)
from propulsion_export.errors import UsageError


@pytest.mark.parametrize("marker", MARKERS)
def test_force_replaces_what_this_tool_wrote(tmp_path, marker):
    out = tmp_path / "out"
    out.mkdir()
    (out / marker).write_text("{}")
    (out / "old").write_text("1")

    with staged_directory(out, force=True, marker=marker) as staged:
        (staged / "new").write_bytes(b"2")

    assert content_of(out) == {"new": b"2"}
    assert list(tmp_path.iterdir()) == [out]


def test_an_existing_output_is_refused_without_force(tmp_path):
    refused(ours(tmp_path / "out"), "exists and is not empty.*--force", force=False)


def test_a_strangers_directory_is_refused_even_with_force(tmp_path):
    out = tmp_path / "photos"
    (out / "deep").mkdir(parents=True)
    (out / "holiday.png").write_bytes(b"1")
    # A marker deeper inside, or one that is a directory, does not make it ours.
    (out / "deep" / "propulsion.json").write_bytes(b"1")
    (out / "adapter_config.json").mkdir()

    refused(out, "expected nothing but an output of this command", force=True)


def test_one_output_is_not_replaced_by_several_nor_several_by_one(tmp_path):
    one, many = ours(tmp_path / "one"), tmp_path / "many"
    many.mkdir()
    ours(many / "a")
    ours(many / "b")
    before = content_of(tmp_path)

    with pytest.raises(UsageError, match="one: is a single output, expected a directory of sev"):
        check_replaceable(one, marker=ADAPTER, force=True, several=["a", "b"])
    with pytest.raises(UsageError, match=r"several outputs \(a, b\), expected a single one"):
        check_replaceable(many, marker=ADAPTER, force=True)

    with pytest.raises(UsageError, match="many: holds b, expected nothing but a and c"):
        check_replaceable(many, marker=ADAPTER, force=True, several=["a", "c"])

    check_replaceable(one, marker=ADAPTER, force=True)
    check_replaceable(many, marker=ADAPTER, force=True, several=["a", "b"])
    assert content_of(tmp_path) == before


@pytest.mark.parametrize("wanted", MARKERS)
@pytest.mark.parametrize("found", MARKERS)
def test_force_replaces_its_own_kind_only(tmp_path, wanted, found):
    out = tmp_path / "out"
    out.mkdir()
    (out / found).write_text("{}")

    if wanted == found:
        check_replaceable(out, marker=wanted, force=True)
        (out / min(set(MARKERS) - {found})).write_text("{}")  # of two kinds: nothing of ours
    with pytest.raises(UsageError, match="--force does not replace it") as caught:
        check_replaceable(out, marker=wanted, force=True)

    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "replaced"),
    [
        ('{"kind": "merged"}', True),
        ("damaged", True),
        ('{"kind": "onnx"}', False),
        ('{"kind": "triton"}', False),
    ],
)
def test_force_replaces_artifacts_of_the_kind_that_is_written(tmp_path, content, replaced):
    out = tmp_path / "out"
    out.mkdir()
    (out / "propulsion.json").write_text(content)
    check = functools.partial(
        check_replaceable, out, marker="propulsion.json", kind="merged", force=True
    )

    if replaced:
        check()
    else:
        with pytest.raises(UsageError, match=r"is of kind .*, not merged.*--force"):
            check()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("destination", "given", "words"),
    [
        ("a", "a", "is an input of this command"),
        ("a", "link", "is an input of this command"),
        ("link", "a", "is an input of this command"),
        ("a", "a/deep/data.csv", "holds .*data.csv, an input"),
        ("a", "link/deep", "holds .*deep, an input"),
        ("a/../a", "b/../a", "is an input of this command"),
    ],
)
def test_an_output_over_an_input_is_refused(tmp_path, destination, given, words, force):
    ours(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "deep").mkdir()
    (tmp_path / "a" / "deep" / "data.csv").write_text("1")
    (tmp_path / "link").symlink_to("a")
    before = content_of(tmp_path)
    output, inputs = tmp_path / destination, [tmp_path / "b", str(tmp_path / given)]
    staged = staged_directory(output, marker=ADAPTER, force=force, inputs=inputs)

    with pytest.raises(UsageError, match=words):
        check_replaceable(output, marker=ADAPTER, force=force, inputs=inputs)
    with pytest.raises(UsageError, match=words):
        staged.__enter__()

    assert content_of(tmp_path) == before


def test_an_output_beside_its_inputs_is_no_matter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours(tmp_path / "a")
    ours(tmp_path / "ab")

    # The last two are no paths here: a model's name, and what no path can be.
    for given in ("a", "ab/weights.json", "", "some/model", "x" * 300, "a\0b"):
        check_replaceable(tmp_path / "ab", marker=ADAPTER, force=True, inputs=[given])


@pytest.mark.parametrize("place", ["/proc/x", "/proc/deep/x"])
def test_where_nothing_can_be_made_is_told_in_words(place):
    if not Path("/proc/self").exists():
        pytest.skip("no /proc here")

    with (
        pytest.raises(UsageError, match=r"nothing (can be created|was written)|no permission"),
        staged_directory(Path(place), marker=ADAPTER),
    ):
        pass
    with pytest.raises(UsageError, match=r"nothing can be created here|no permission"):
        replace_file(Path(place), b"1")


@pytest.mark.parametrize("below", [".", "deep"])
def test_the_current_directory_is_never_replaced(tmp_path, monkeypatch, below):
    out = ours(tmp_path / "out")
    (out / "deep").mkdir()
    monkeypatch.chdir(out / below)

    refused(out, "the current directory lies inside", force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_refused(tmp_path, force):
    (tmp_path / "out").write_bytes(b"1")

    refused(tmp_path / "out", "is a file", force=force)


@pytest.mark.parametrize("below", ["file/out", "file/deep/out"])
def test_a_path_through_a_file_is_refused(tmp_path, below):
    (tmp_path / "file").write_bytes(b"1")

    with pytest.raises(UsageError, match="file: is a file, expected a directory"):
        check_replaceable(tmp_path / below, force=False, marker=ADAPTER)
    with pytest.raises(UsageError, match="a part of the path is a file"):
        replace_file(tmp_path / below, b"1")

    assert content_of(tmp_path) == {"file": b"1"}


@pytest.mark.parametrize("force", [False, True])
def test_a_name_that_is_too_long_is_refused(tmp_path, force):
    with (
        pytest.raises(UsageError, match="the name is too long"),
        staged_directory(tmp_path / ("x" * 300), force=force, marker=ADAPTER),
    ):
        pass

    assert list(tmp_path.iterdir()) == []


def test_what_another_process_wrote_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"

    def work():
        with staged_directory(out, marker=ADAPTER) as staged:
            (staged / "mine").write_bytes(b"1")
            ours(out, b"theirs")

    with pytest.raises(UsageError, match="not empty"):
        work()

    assert content_of(out) == {"adapter_config.json": b"{}", "weights": b"theirs"}
    assert list(tmp_path.iterdir()) == [out]


def test_an_output_inside_an_input_loses_nothing_and_is_allowed(tmp_path):
    ours(tmp_path / "a")
    before = content_of(tmp_path)

    with staged_directory(tmp_path / "a" / "new", marker=ADAPTER, inputs=[tmp_path / "a"]) as new:
        (new / "one").write_text("1")

    assert content_of(tmp_path) == before | {"a/new/one": b"1"}
