"""Adapters of the reference server are listed and change while it answers."""

import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from reference_server import TEXTS, ask, check_right, predict, serving

from propulsion_export import Session
from propulsion_export.artifacts.artifact import Artifact


def test_adapters_change_under_load_and_every_answer_is_of_the_version_it_names(world, session):
    with serving(session) as running, ThreadPoolExecutor(6) as clients:
        done = threading.Event()

        def client(seed):
            answers = []
            while not done.is_set():
                text = TEXTS[(seed + len(answers)) % len(TEXTS)]
                name = ("one", "new", "two")[len(answers) % 3]
                answers.append((text, name, *predict(running.port, text, name)[:2]))
            return answers

        asking = [clients.submit(client, seed) for seed in range(5)]
        statuses = []
        for source in ("one", "two", "three", "one", "two", "three"):
            body = {"path": str(world.root / source)}
            statuses.append(ask(running.port, "PUT", "/adapters/new", body)[0])
            told = predict(running.port, TEXTS[0], "new")[1]
            assert told["version"] == world.versions[source]
            if source == "three":
                statuses.append(ask(running.port, "DELETE", "/adapters/new")[0])
                assert predict(running.port, TEXTS[0], "new")[0] == 404
        done.set()
        answers = [one for each in asking for one in each.result()]

    assert statuses == [204] * 8
    seen = Counter()
    for text, name, status, told in answers:
        if status == 404:
            assert (name, "has no adapter 'new'" in told["error"]) == ("new", True)
        else:
            assert status == 200
            assert name == "new" or told["version"] == world.versions[name]
            check_right(world, text, told)
        seen[name, status] += 1
    assert seen["new", 200] > 5
    assert seen["one", 200] > 5


def test_adapters_are_listed_and_mistakes_with_them_told(world, session, tmp_path):
    with serving(session) as running:
        port = running.port
        listed = [ask(port, "GET", "/adapters")[1]]
        put = ask(port, "PUT", "/adapters/more", {"path": str(world.root / "three")})[0]
        listed.append(ask(port, "GET", "/adapters")[1])
        wrong = [
            ask(port, "PUT", "/adapters/x", {"path": str(tmp_path / "nowhere")}),
            ask(port, "PUT", "/adapters/base", {"path": str(world.root / "one")}),
            ask(port, "DELETE", "/adapters/x"),
            ask(port, "PUT", "/adapters/x", {"path": "\ud800"}),
        ]
        # Another process changes them too.
        Session(tmp_path / "bank").remove("one")
        listed.append(ask(port, "GET", "/adapters")[1])

    assert put == 204
    assert listed == [
        ["base", "one", "two"],
        ["base", "more", "one", "two"],
        ["base", "more", "two"],
    ]
    assert [status for status, *_ in wrong] == [422, 422, 404, 422]
    assert "has no adapter_config.json, expected a PEFT" in wrong[0][1]["error"]
    assert "\\ud800" in wrong[3][1]["error"]


def test_a_repointed_link_is_followed_when_the_adapters_are_listed(world, tmp_path):
    releases = [tmp_path / f"release-{number}" for number in (1, 2, 3)]
    for release in releases:
        shutil.copytree(world.root / "bank", release)
    Session(releases[1]).add(f"more={world.root / 'three'}")
    other = Artifact.read(releases[2])
    base = replace(other.manifest.base, source="elsewhere")
    other.with_manifest(replace(other.manifest, base=base))
    link = tmp_path / "current"
    link.symlink_to(releases[0])
    with serving(Session(link)) as running:
        port, place = running.port, {"path": str(world.root / "three")}
        link.unlink()
        link.symlink_to(releases[1])
        early = [
            ask(port, "PUT", "/adapters/x", place),
            ask(port, "DELETE", "/adapters/one"),
            predict(port, TEXTS[0], "one"),
            predict(port, TEXTS[0], "more"),
        ]
        listed = [ask(port, "GET", "/adapters")[1]]
        statuses = [
            predict(port, TEXTS[0], "more")[0],
            ask(port, "PUT", "/adapters/x", place)[0],
            ask(port, "DELETE", "/adapters/one")[0],
        ]
        link.unlink()
        link.symlink_to(releases[2])
        refused = ask(port, "GET", "/adapters")
        still = predict(port, TEXTS[0], "x")[0]

    assert [status for status, *_ in early] == [422, 422, 200, 404]
    assert all("nothing was changed. Refresh" in told["error"] for _, told, _ in early[:2])
    assert listed == [["base", "more", "one", "two"]]
    assert (statuses, refused[0], still) == ([200, 204, 204], 500, 200)
    assert "release-3: is another model than" in refused[1]["error"]
    found = [sorted(Artifact.read(release).list_adapters()) for release in releases]
    assert found == [["one", "two"], ["more", "two", "x"], ["one", "two"]]
