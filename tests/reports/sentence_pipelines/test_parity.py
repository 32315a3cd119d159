"""Parity judges the embedding too."""

import numpy as np
import pytest
from safetensors.numpy import save_file
from sentence_pipelines import changed, dense

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.parity import check_parity


def test_parity_judges_the_embedding_too(bank):
    report = check_parity(bank.directory)

    assert report.passed
    pooling = next(check for check in report.checks if check.case == "pooling")
    assert "(cls,weightedmean)" in pooling.detail
    judged = [check for check in report.checks if check.case == "parity"]
    assert len(judged) == 3
    for check in judged:
        sizes = {output.output: output.elements for output in check.outputs}
        assert sizes["sentence_embedding"] == 16 * 64
        assert all(output.error > 0 for output in check.outputs)


def test_parity_says_that_there_is_no_pipeline(plain, tmp_path):
    merge(plain.one, tmp_path / "merged")

    report = check_parity(tmp_path / "merged")

    assert report.passed
    details = [check.detail for check in report.checks if check.case == "pooling"]
    assert len(details) == 1
    assert "there is no sentence pipeline" in details[0]


@pytest.mark.parametrize("mistake", ["pooling", "weights", "lost"])
def test_parity_fails_where_the_artifact_pools_otherwise(mistake, base, plain, tmp_path):
    merge(plain.one, tmp_path / "merged", model=str(base("dense")))
    if mistake == "pooling":
        changed(tmp_path / "merged", "1_Pooling/config.json", pooling_mode="mean")
    elif mistake == "weights":
        _, weights = dense(32, 7, "activation.Tanh", seed=1)
        arrays = {name: values.astype(np.float32) for name, values in weights.items()}
        save_file(arrays, tmp_path / "merged" / "2_Dense" / "model.safetensors")
    else:
        (tmp_path / "merged" / "modules.json").unlink()
    read = Artifact.write(tmp_path / "merged", replace_files(tmp_path / "merged"))

    report = check_parity(read.directory)

    assert not report.passed
    assert [check.case for check in report.checks if not check.passed] == ["pooling"]


def replace_files(directory):
    """The manifest as it was, to be written with the digests of the files as they are now."""
    from propulsion_export.artifacts.manifest import read_manifest

    return read_manifest(directory / "propulsion.json")
