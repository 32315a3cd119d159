"""gunicorn with `--preload`: the artifact is loaded before the workers are forked."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from forks import KINDS, SECONDS

from propulsion_export.serving.session import Session

APP = """
import json, os
from propulsion_export.errors import UsageError
from propulsion_export.serving.session import Session

inherited, own = Session(os.environ["ARTIFACT"]), None
inherited("ba be", "three")

def ask_the_inherited():
    try:
        inherited("ba be", "three")
    except UsageError as error:
        return str(error)

def application(environ, start_response):
    global own
    own = own or Session(os.environ["ARTIFACT"])
    own.refresh()
    [reply] = own("ba be", environ["PATH_INFO"].strip("/"))
    found = {"worker": os.getpid(), "said": ask_the_inherited(), **reply.prediction}
    body = json.dumps(found).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""


@pytest.fixture
def serve(tmp_path):
    """A function: gunicorn with two workers for an artifact; the port, the process and its log."""
    (tmp_path / "app.py").write_text(APP)
    log, servers = tmp_path / "log", []

    def start(directory):
        with socket.create_server(("127.0.0.1", 0)) as listening, log.open("wb") as output:
            port, bound = listening.getsockname()[1], listening.fileno()
            words = ["gunicorn", "--preload", "--workers", "2", "--bind", f"fd://{bound}"]
            server = subprocess.Popen(
                [sys.executable, "-m", *words, "--chdir", tmp_path, "app:application"],
                env=os.environ | {"ARTIFACT": str(directory)},
                pass_fds=[bound],
                stdout=output,
                stderr=output,
            )
        servers.append(server)
        return port, server, log

    yield start
    for server in servers:
        server.kill()
        server.wait()


def ask(port, adapter):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2 * SECONDS)
    connection.request("GET", f"/{adapter}")
    reply = connection.getresponse()
    assert reply.status == 200
    return json.loads(reply.read())


@pytest.mark.parametrize("kind", KINDS)
def test_workers_answer_by_sessions_of_their_own_and_hold_no_lock(kind, copied, world, serve):
    directory = copied(kind)
    session = Session(directory)
    [expected] = session("ba be", "three")
    port, server, log = serve(directory)

    replies = [ask(port, "three")]
    while len({reply["worker"] for reply in replies}) < 2 and len(replies) < 200:
        replies.append(ask(port, "three"))
    began = time.monotonic()
    session.add(f"new={world.five}")
    added = time.monotonic() - began
    later = ask(port, "new")
    server.send_signal(signal.SIGTERM)

    assert len({reply["worker"] for reply in replies}) == 2
    assert all("Open a session in each process" in reply["said"] for reply in replies)
    assert all(reply["label"] == expected.prediction["label"] for reply in replies)
    assert later["score"] == pytest.approx(session("ba be", "new")[0].prediction["score"])
    assert added < SECONDS / 2
    assert server.wait(SECONDS) == 0
    assert "Traceback" not in log.read_text()
