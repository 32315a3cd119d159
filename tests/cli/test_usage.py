"""Calls that cannot be meant are refused before any work."""

import json
from dataclasses import replace

import pytest

from propulsion_export.artifacts.artifact import Artifact

# Usage


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tarin"], "No such command 'tarin'. Did you mean 'train'?"),
        (["xyzzy"], "No such command 'xyzzy'."),
        (["inspect"], "Missing argument 'PATH'."),
        (["inspect", "a", "b"], "Got unexpected extra argument (b)"),
        (["inspect", "--jason", "a"], "No such option"),
        (["export", "-o", "out"], "Missing option '-a' / '--adapter'."),
        (["merge", "-a", "a"], "Missing option '-o' / '--output'."),
        (["merge", "-a", "a", "-o", "out", "--dtype", "int8"], "Invalid value for '--dtype'"),
        (["onnx", "-a", "a", "-o", "out", "--opset", "9"], "Invalid value for '--opset'"),
        (["trt", "a", "-o", "out", "--builder-optimization-level", "6"], "Invalid value"),
        (["adapter", "ad"], "No such command 'ad'."),
        (["adapter", "add", "a"], "Missing argument '[NAME=]ADAPTER'."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_usage_error_ends_with_2_and_is_told_on_stderr(run, words, told):
    code, out, err = run(*words)

    assert (code, out) == (2, "")
    assert told in err
    assert "Traceback" not in err


def test_no_command_at_all_shows_the_help_and_ends_with_2(run):
    code, out, err = run()

    assert (code, out) == (2, "")
    assert "Commands:" in err


@pytest.mark.parametrize("words", [["inspect"], ["tarin"], ["merge", "-a", "a"]], ids=" ".join)
def test_a_usage_error_is_json_on_stdout_when_asked(run, words):
    code, out, err = run(*words, "--json")

    assert code == 2
    assert json.loads(out)["exit_code"] == 2
    assert out.count("\n") == 1
    assert json.loads(out)["error"] in err


# Options that do nothing


def ignored(adapter, artifact, tmp_path):
    """Calls with options that would do nothing: by the options, the whole call and the message."""
    out, texts = tmp_path / "out", tmp_path / "texts.txt"
    texts.write_text("a\n")
    onnx, parity, run = ["onnx", "-a", adapter, "-o", out], ["parity", artifact], ["run", artifact]
    run += ["--text", "a"]
    export, trains = ["export", "-a", adapter, "-o", out], "which trains no head"
    train = ["train", "-m", "m", "-d", "d", "-o", out, "--task"]
    package = ["package", artifact, "-o", out, "--layout", "genai"]
    other_task = "for generating text, the artifact is for text-classification"
    return {
        "--untie": ([*onnx, "--mode", "bank"], "does nothing with --mode bank"),
        "--allow-range": (onnx, "does nothing with --mode folded"),
        "--placement all": ([*onnx, "--mode", "bank"], "is for slots without adapters"),
        "--max-labels 3": ([*onnx, "--mode", "bank"], "is for slots without adapters"),
        "--train-bias": ([*onnx, "--mode", "bank"], "is for slots without adapters"),
        "--runtime auto": ([*export, "--no-engine"], "does nothing with --no-engine"),
        "--target auto": ([*export, "--no-engine"], "does nothing with --no-engine"),
        "--force": (parity, "does nothing without --report"),
        "--seed 0": ([*parity, "--inputs", texts, "--quick"], "does nothing with --inputs"),
        "--max-new-tokens 128": (run, other_task),
        "--temperature 1": (run, other_task),
        "--top-k 1": (run, other_task),
        "--top-p 1": (run, other_task),
        "--seed 1": (run, other_task),
        "--head-learning-rate 0.01": ([*train, "text-generation"], trains),
        "--no-head-only": ([*train, "text2text-generation"], trains),
        "--packing": ([*train, "text-classification"], "expected none for --task"),
        "--model-name a": (package, "for --layout triton, found genai"),
        "--max-batch-size 32": (package, "for --layout triton, found genai"),
    }


@pytest.mark.parametrize(
    "option",
    [
        *("--untie", "--allow-range", "--placement all", "--max-labels 3", "--train-bias"),
        *("--runtime auto", "--target auto", "--force", "--seed 0"),
        *("--max-new-tokens 128", "--temperature 1", "--top-k 1", "--top-p 1", "--seed 1"),
        *("--head-learning-rate 0.01", "--no-head-only", "--packing"),
        *("--model-name a", "--max-batch-size 32"),
    ],
)
def test_an_option_that_does_nothing_is_refused_by_name(run, adapter, artifact, tmp_path, option):
    words, message = ignored(adapter, artifact, tmp_path)[option]

    code, out, err = run(*words, *option.split())

    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert option.split()[0].removeprefix("--") in err
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_seed_without_sampling_is_refused(run, artifact):
    Artifact.write(artifact, replace(Artifact.read(artifact).manifest, task="text-generation"))

    code, out, err = run("run", artifact, "--text", "a", "--seed", 1)

    assert (code, out) == (2, "")
    assert "--seed: " in err
    assert "--temperature, --top-k or --top-p" in err


def test_a_seed_beside_inputs_is_taken_where_the_slots_have_no_adapter(run, artifact, tmp_path):
    Artifact.write(artifact, replace(Artifact.read(artifact).manifest, adapters={}))
    (tmp_path / "texts.txt").write_text("a\n")

    code, out, err = run("parity", artifact, "--inputs", tmp_path / "texts.txt", "--seed", 1)

    assert (code, out) == (4, "")  # nobody runs this graph
    assert "--seed" not in err


@pytest.mark.parametrize(
    ("output", "options", "refused"),
    [
        ("merged.gguf", ["--share"], "--share: a merged GGUF file is one new file. Leave it out."),
        ("merged.gguf", ["--dtype", "float16"], "--dtype: every tensor of a GGUF file keeps its"),
        (
            "merged.gguf",
            ["-a", "other"],
            "a GGUF file takes one. Merge each into a file of its own",
        ),
        ("merged", ["--allow-range"], "--allow-range: is for GGUF files. Leave it out."),
    ],
)
def test_options_of_the_other_kind_of_merge_are_refused(output, options, refused, run, adapter):
    code, _, error = run("merge", "-a", adapter, "-o", adapter.parent / output, *options)

    assert (code, refused in error) == (2, True), error
