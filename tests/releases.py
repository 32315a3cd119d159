"""Releases that are switched by a link, `current -> release-1`, for tests of what is read then.

What is computed is always of one release, and what is written goes to the one that was meant or
nowhere.
"""

import hashlib
import json
import shutil

import pytest

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.changing import add_adapter

KINDS = ("switchable", "banked")
TEXT = "ba be"
both = pytest.mark.parametrize("kind", KINDS)


class Releases:
    """`current`, a link to the first of three releases; the third is of another model.

    In `second` the adapter `three` is another one and `new` is there too; the tokenizer of `other`
    has two words in each other's place.
    """

    def __init__(self, artifact, root, five):
        self.link = root / "current"
        self.first, self.second, self.other, self.empty = (
            root / name for name in ("release-1", "release-2", "release-3", "nothing")
        )
        for release in (self.first, self.second, self.other):
            shutil.copytree(artifact, release)
        self.empty.mkdir()
        add_adapter(self.second, f"three={five}", force=True)
        add_adapter(self.second, f"new={five}")
        swap_words(self.other)
        self.point(self.first)

    def point(self, to):
        aside = self.link.with_name("next")
        aside.symlink_to(to)
        aside.replace(self.link)

    def put_in_place_of_first(self, other):
        self.first.rename(self.first.with_name("gone"))
        other.rename(self.first)

    def contents(self):
        """The digest of every file of all releases."""
        root = self.link.parent
        files = [
            path
            for release in root.iterdir()
            if not release.is_symlink()
            for path in release.rglob("*")
            if path.is_file()
        ]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def exchange_words(directory):
    """Let an artifact's tokenizer give two words each other's token."""
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    words["ba"], words["be"] = words["be"], words["ba"]
    file.write_text(json.dumps(content))
    (directory / "serving_tokenizer.json").unlink(missing_ok=True)


def swap_words(release):
    manifest = Artifact.read(release).manifest
    exchange_words(release)
    Artifact.write(release, manifest)


def asked(session, name="three"):
    [reply] = session(TEXT, name)
    return reply.version, reply.prediction, reply.outputs["logits"].tolist()
