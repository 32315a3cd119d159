"""Clean artifacts as `Copy` writes them; kept for as long as nothing that makes them changes."""

import shutil
from pathlib import Path

from mutation.planted import Copy
from mutation.stamps import exports_stamp
from mutation.toys import Toy, build


def exports(root: Path) -> Path:
    """The directory of artifacts below `root`; those that other sources made are removed."""
    directory = root / "exports"
    stamp, now = directory / "stamp", exports_stamp()
    if not stamp.is_file() or stamp.read_text() != now:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        stamp.write_text(now)
    return directory


def baseline(toy: Toy, root: Path) -> Path:
    """The directory of an artifact as `Copy` writes it without a mistake, exported if need be."""
    artifact = build(toy, exports(root))
    directory = artifact.with_name(f"{artifact.name}.baseline")
    if not directory.is_dir():
        staged = artifact.with_name(f"{artifact.name}.staged")
        shutil.rmtree(staged, ignore_errors=True)
        copy = Copy(artifact, staged)
        _ = copy.graphs, copy.checkpoint
        copy.write()
        staged.rename(directory)
    return directory
