"""The reference server and its load test as programs."""

import re
import time

import pytest
from reference_server import Gated, ask, load, server, serving

from propulsion_export import Session


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.3", "example.org"])
def test_an_address_that_others_reach_is_refused_with_the_reason(host, capsys):
    with pytest.raises(SystemExit, match="2"):
        server.main(["bank", "--host", host])

    told = " ".join(capsys.readouterr().err.split())
    assert f"{host} can be reached from other machines, expected 127.0.0.1, localhost, ::1" in told
    assert "no authentication" in told


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_loopback_address_is_not_refused(host):
    assert server.loopback(host) == host


def test_what_is_no_artifact_is_told_in_one_line(tmp_path):
    with pytest.raises(SystemExit) as ended:
        server.main([str(tmp_path)])

    assert str(ended.value).startswith(f"samples/server.py: {tmp_path}")


def test_the_program_serves_on_the_loopback_address_alone(world, monkeypatch):
    started = {}
    monkeypatch.setattr(server.uvicorn, "run", lambda app, **options: started.update(options))

    server.main([str(world.root / "bank"), "--port", "1234"])

    stopping = {"timeout_graceful_shutdown": server.STOPPING}
    assert started == {"host": "127.0.0.1", "port": 1234, "access_log": False} | stopping


def test_load_compares_two_servers(session, world, capsys):
    with (
        serving(session) as mixing,
        serving(Session(world.root / "bank"), by_adapter=True) as other,
    ):
        urls = [f"http://127.0.0.1:{one.port}" for one in (mixing, other)]
        options = ["--requests", "60", "--rounds", "2", "--concurrency", "12"]
        load.main(["--url", urls[0], "--against", urls[1], *options])
        metrics = [ask(one.port, "GET", "/metrics")[1] for one in (mixing, other)]

    first, *rounds, ratio = capsys.readouterr().out.splitlines()
    assert first == "12 clients, 2 adapters"
    assert [line.split()[0] for line in rounds] == urls * 2
    assert all("60 of 60 answered" in line for line in rounds)
    assert re.fullmatch(r"throughput: [\d.]+ times the other's \(rounds: [\d.]+, [\d.]+\)", ratio)
    assert metrics[0]["adapters_per_batch"] > 1
    assert metrics[1]["adapters_per_batch"] == 1


def test_load_counts_what_is_refused(session, capsys):
    class Slow(Gated):
        def __call__(self, texts, adapter):
            time.sleep(0.02)
            return super().__call__(texts, adapter)

    with serving(Slow(session), queue=1, rows=1) as running:
        url = f"http://127.0.0.1:{running.port}"
        load.main(["--url", url, "--requests", "40", "--rounds", "1", "--concurrency", "8"])

    assert re.search(r"\d+ of 40 answered .*not 200: \{503: \d+\}", capsys.readouterr().out)
