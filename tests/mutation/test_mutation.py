"""A dozen planted mistakes, the clean artifact beside them, and the gate that counts them."""

import json
import math
from dataclasses import asdict, replace

import pytest

from mutation import running
from mutation.baselines import baseline
from mutation.judging import judge
from mutation.planted import Copy
from mutation.remembering import Memory
from mutation.report import BEGIN, END, LIMIT, Score, table, write_json, write_table
from mutation.results import Results, Run, one_at_a_time
from mutation.running import FAMILIES, KINDS, Plan, chosen_places, plant_and_judge, run_all
from mutation.toys import TOYS, Toy
from mutation.visible import Visible

TOY = Toy("bert", "switchable", "float32", "text-classification")
# Every one moves an output by more than the limit.
DOZEN = (
    "a channel of a weight off by 1.0%",
    "a square weight transposed",
    "the weights of two layers exchanged",
    "a norm's weight lost",
    "softmax over another axis",
    "the second addend of a residual dropped",
    "a bias outside the product",
    "ids off by one",
    "the mask not read",
    "NaN in the last row of an output",
    "a scale shifted by one channel",
    "all scales of the degree above",
    "two adapters exchanged",
    "labels in another order",
)


@pytest.fixture(scope="module", name="bench")
def make_bench(tmp_path_factory):
    """The root of the artifacts, a clean one, a memory, and what a user sees of it."""
    root = tmp_path_factory.mktemp("mutation")
    clean = baseline(TOY, root)
    return root, clean, Memory(), Visible(clean, TOY)


def kind_named(name):
    return next(kind for kind in KINDS if kind.name == name)


@pytest.mark.parametrize("name", DOZEN)
def test_a_planted_mistake_moves_an_output_and_is_caught(name, bench, tmp_path):
    root, clean, memory, visible = bench
    kind = kind_named(name)
    (place,) = chosen_places(kind, Copy(clean, tmp_path / "view"), Plan(root, places=1))

    run = plant_and_judge(TOY, kind, place, clean, memory, visible)

    assert run.moved > LIMIT, run
    assert run.outcome == "caught", run


def test_the_same_artifact_without_a_mistake_passes_and_moves_nothing(bench):
    _, clean, memory, visible = bench

    assert judge(clean, memory).outcome == "passed"
    assert visible.moved(clean, texts=True).allowed == 0


def test_a_copy_without_a_change_is_not_counted_as_caught(bench):
    _, clean, memory, visible = bench
    kind = replace(KINDS[0], plant_=lambda copy, place: None)

    run = plant_and_judge(TOY, kind, ("nowhere",), clean, memory, visible)

    assert run.outcome == "unchanged"
    assert not Score([run]).planted


def test_a_verdict_that_remembers_says_what_one_without_memory_says(bench, tmp_path):
    root, clean, memory, _ = bench
    copy = Copy(clean, tmp_path / "copy")
    kind = kind_named("a channel of a weight off by 1.0%")
    kind.plant_(copy, chosen_places(kind, copy, Plan(root, places=1))[0])
    assert copy.write()
    judge(clean, memory)
    before = memory.computed

    found = judge(copy.directory, memory)

    assert found.outcome == "caught"
    assert found == judge(copy.directory, Memory())
    assert memory.computed == before


def test_what_there_are_results_of_is_not_run_again(bench, monkeypatch):
    root, *_ = bench
    plan = Plan(root, [TOY], ("two adapters exchanged", "a label with another name"), 1, clean=1)
    first = list(run_all(plan, Results(root)))

    monkeypatch.setattr(running, "judge", lambda *args, **kwargs: pytest.fail("judged again"))

    assert [run.kind for run in first] == [*plan.kinds, "clean"]
    assert {run.outcome for run in first} == {"passed", "caught"}
    assert list(run_all(plan, Results(root))) == []
    assert list(Results(root).runs.values()) == first


def test_no_run_begins_after_the_time_is_over(bench):
    root, *_ = bench

    assert list(run_all(Plan(root, [TOY], ("a norm's weight lost",), until=0), Results(root))) == []


def test_two_runs_do_not_share_a_directory(bench):
    root, *_ = bench
    with one_at_a_time(root), pytest.raises(RuntimeError, match="another run uses it"):
        list(run_all(Plan(root, [TOY], ("a norm's weight lost",)), Results(root)))


def test_there_are_more_than_eighty_kinds_and_no_two_of_one_name():
    names = [kind.name for kind in KINDS]

    assert len(names) == len(set(names))
    assert len(names) > 80
    assert len({toy.name for toy in TOYS}) == len(TOYS)
    assert all(family.kinds for family in FAMILIES)


def run_of(outcome, moved, kind="ids off by one", **fields):
    return Run("toy", "encoder", "float32", "folded", kind, "0", outcome, moved=moved, **fields)


def test_the_gate_fails_for_a_visible_mistake_that_passes():
    assert Score([run_of("caught", 9.0), run_of("passed", LIMIT)]).passed
    assert not Score([run_of("caught", 9.0), run_of("passed", 1.1 * LIMIT)]).passed
    assert not Score([run_of("passed", math.inf)]).passed
    assert not Score([run_of("crashed", math.inf)]).passed


def test_the_gate_fails_for_a_clean_artifact_that_is_condemned():
    assert Score([run_of("passed", 0.0, "clean")]).passed
    assert not Score([run_of("caught", 0.0, "clean")]).passed


def test_what_does_not_apply_is_neither_planted_nor_caught():
    score = Score([run_of("inapplicable", 0.0), run_of("unplantable", math.inf)])

    assert not score.planted
    assert "0 mistakes of 0 kinds" in score.summary()


def test_the_table_has_caught_of_planted_by_precision(tmp_path):
    runs = [run_of("caught", 8.0), run_of("passed", 7.0), run_of("caught", 2.0)]
    runs.append(replace(run_of("refused", math.inf), precision="float16"))
    file = tmp_path / "parity.md"
    file.write_text(f"before\n{BEGIN}\nearlier runs\n{END}\nbehind\n")

    write_table(Score(runs), file)

    assert "| ids off by one | 1/2 | 1/1 | 1/1 | 2 |" in table(Score(runs))
    runs.append(run_of("caught", 8.0, "a weight off by 1.0%", size=0.01))
    runs.append(run_of("passed", 8.0, "a weight off by 0.1%", size=0.001))
    assert "| a weight off by | 1.0% | - |" in table(Score(runs))
    text = file.read_text()
    assert text.startswith("before\n")
    assert text.endswith("behind\n")
    assert "earlier runs" not in text


def test_the_tables_name_artifacts_clean_runs_and_the_commit():
    runs = [run_of("caught", 8.0), run_of("passed", 0.0, "clean"), run_of("caught", 0.0, "clean")]
    runs = [replace(run, toy=TOY.name, all_seconds=30.0, seconds=2.0) for run in runs]

    text = table(Score(runs, {"commit": "abc, changed", "tools": {"python": "3.11"}}))

    assert f"| {TOY.name} | 1/1 | - | 1/2 | 2.0 s |" in text
    assert "took 0 and 1 minutes of one core" in text
    assert "commit abc, changed, with python 3.11" in text


def test_a_file_without_markers_is_refused(tmp_path):
    (tmp_path / "parity.md").write_text("no table\n")

    with pytest.raises(ValueError, match="expected both"):
        write_table(Score([]), tmp_path / "parity.md")


def test_the_json_has_every_run_and_no_infinity(tmp_path):
    write_json(Score([run_of("passed", math.inf)]), tmp_path / "mutation.json")

    value = json.loads((tmp_path / "mutation.json").read_text())
    assert value["passed"] is False
    assert value["runs"][0]["moved"] is None
    assert value["missed"][0]["kind"] == "ids off by one"
    assert set(value["runs"][0]) == set(asdict(run_of("passed", 1.0)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "llama", "bart"])
def test_every_visible_mistake_in_an_artifact_is_caught(kind, tmp_path):
    """One place of every kind; `make mutation` plants them in all artifacts."""
    toy = next(toy for toy in TOYS if toy.kind == kind and toy.mode == "switchable")
    plan = Plan(tmp_path, [toy], places=1, clean=1)

    score = Score(list(run_all(plan, Results(tmp_path))))

    assert not {run.kind for run in score.missed}
    assert not score.false_alarms
