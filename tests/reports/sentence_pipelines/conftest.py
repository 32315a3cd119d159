import shutil

import pytest
from sentence_pipelines import PIPELINES, write_pipeline

from propulsion_export.pipeline.onnx import export_onnx


@pytest.fixture
def plain(make_world):
    return make_world("bert", "feature-extraction")


@pytest.fixture
def base(plain, tmp_path):
    """`base("cls")`: a copy of the tiny BERT with that pipeline."""

    def make(name, directory="base"):
        copied = shutil.copytree(plain.base, tmp_path / directory)
        modules, others, _, _ = PIPELINES[name]
        return write_pipeline(copied, modules, others)

    return make


@pytest.fixture(scope="session")
def bank(make_world, tmp_path_factory):
    """A bank of two adapters whose base leaves its prompt out; copy it before changing it."""
    plain, root = make_world("bert", "feature-extraction"), tmp_path_factory.mktemp("bank")
    source = shutil.copytree(plain.base, root / "base")
    modules, others, _, _ = PIPELINES["a prompt left out"]
    write_pipeline(source, modules, others)
    return export_onnx([plain.one, plain.two], root / "bank", model=str(source), mode="bank")


@pytest.fixture
def own(plain, tmp_path):
    """`own("one", "cls")`: a copy of the adapter with a pipeline of its own."""

    def make(name, kind):
        directory = shutil.copytree(getattr(plain, name), tmp_path / "own" / name)
        modules, others, _, _ = PIPELINES[kind]
        return write_pipeline(directory, modules, others)

    return make
