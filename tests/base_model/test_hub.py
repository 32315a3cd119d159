"""A base model that is neither here nor on a hub is refused in seconds; others are downloaded."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from propulsion_export.base_model import hub
from propulsion_export.errors import BaseModelError

COMMIT = "1" * 40
FILES = {"config.json": b'{"model_type": "bert"}', "LICENSE": b"be kind"}
ASK = """
import sys, time
from propulsion_export.base_model.hub import check_findable, file_names, locate
start = time.monotonic()
try:
    check_findable(sys.argv[1])
    print(locate(sys.argv[1], "config.json").read_text(), locate(sys.argv[1], "absent.json"))
    print(file_names(sys.argv[1]))
except Exception as error:
    print(type(error).__name__, error)
print(time.monotonic() - start, file=sys.stderr)
"""


class Hub(BaseHTTPRequestHandler):
    """One model, `owner/model`; others are not there."""

    def do_HEAD(self):
        name = self.path.rpartition("/")[2]
        if not self.path.startswith("/owner/model/") or name not in FILES:
            code = "EntryNotFound" if self.path.startswith("/owner/model/") else "RepoNotFound"
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(FILES[name]).hexdigest()}"')
        self.send_header("Content-Length", str(len(FILES[name])))
        self.end_headers()
        return FILES[name]

    def do_GET(self):
        if self.path.startswith("/api/models/owner/model/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": "1" * 40}
                for name, content in FILES.items()
            ]
            content = json.dumps(entries).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        elif content := self.do_HEAD():
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    """The address of a hub that runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def ask(source, home, **environment):
    """What is said of a source, and how long that takes without imports."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", ASK, source],
        env=kept | {"HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, float(done.stderr.splitlines()[-1])


def test_what_is_nowhere_is_refused_in_seconds_where_there_is_no_hub(tmp_path):
    said, seconds = ask("typo", tmp_path, HF_ENDPOINT="http://127.0.0.1:1")

    assert said.startswith("BaseModelError typo: there is no directory of this name")
    assert "not in the cache and http://127.0.0.1:1 cannot be reached (" in said
    assert len(said.splitlines()) == 1
    assert seconds < 10


def test_what_is_nowhere_is_refused_at_once_when_offline(tmp_path):
    said, seconds = ask("typo", tmp_path, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:1")

    assert "not in the cache and HF_HUB_OFFLINE is set" in said
    assert seconds < 10


def test_a_model_is_downloaded_and_used_again_without_the_hub(endpoint, tmp_path):
    expected = "{\"model_type\": \"bert\"} None\n['LICENSE', 'config.json']\n"
    first, _ = ask("owner/model", tmp_path, HF_ENDPOINT=endpoint)
    gone, seconds = ask("owner/model", tmp_path, HF_ENDPOINT="http://127.0.0.1:1")
    offline, _ = ask("owner/model", tmp_path, HF_HUB_OFFLINE="1")

    assert first == expected
    # A cache has what was asked for.
    assert gone == offline == expected.replace("'LICENSE', ", "")
    assert seconds < 10


def test_a_hub_that_does_not_answer_is_not_waited_for(tmp_path, monkeypatch):
    import huggingface_hub

    waited = []

    def silent(url, *, timeout):
        waited.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", silent)
    hub._unreachable_hub.cache_clear()
    start = time.monotonic()

    for _ in range(20):
        assert hub.locate("no-such-model-anywhere", "config.json") is None

    assert time.monotonic() - start < 10
    assert len(waited) <= 2  # the minute may end meanwhile
    assert max(waited) <= 5
    hub._unreachable_hub.cache_clear()


def test_a_file_of_a_checkpoint_is_no_base_model(tmp_path):
    file = tmp_path / "config.json"
    file.write_text("{}")

    with pytest.raises(BaseModelError, match=r"config\.json: is a file, expected a directory"):
        hub.check_findable(str(file))
