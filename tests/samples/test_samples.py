import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.cli.app import app

SAMPLES = Path(__file__).parents[2] / "samples"
README = (SAMPLES / "README.md").read_text()
NUMBERED = sorted(file.name for file in SAMPLES.glob("[0-9]*.py"))
# The adapters decide for one class whatever the text is, so that a test knows what is printed.
WINNERS = {"topic": 2, "part-of-speech": 0}
LABELS = ("no", "yes", "maybe")


def commands_of(readme):
    """The command lines that a reader copies, by sample."""
    found = {}
    for line in readme.replace("\\\n", " ").splitlines():
        if line.startswith("    ."):
            program, sample, *arguments = shlex.split(line)
            assert program == ".venv/bin/python"
            found[Path(sample).name] = [sample, *arguments]
    return found


COMMANDS = commands_of(README)


# The numbered samples, each run as the README says


@pytest.fixture(scope="session")
def root(tmp_path_factory, random_adapter):
    """A directory with the samples and, as if `make demo` had run, two adapters."""
    from transformers import AutoModelForSequenceClassification

    directory = tmp_path_factory.mktemp("root")
    (directory / "samples").symlink_to(SAMPLES)
    model_directory = load("minilm").model_directory()
    model = AutoModelForSequenceClassification.from_pretrained(
        model_directory, num_labels=len(LABELS)
    )
    for seed, (name, winner) in enumerate(WINNERS.items()):
        made = random_adapter(
            model, seed, name, head=True, labels=LABELS, task="text-classification"
        )
        bias = 20 * np.eye(len(LABELS), dtype=np.float32)[winner]
        made = replace(
            made,
            modules=dict(made.modules) | {"classifier.bias": bias},
            base=str(model_directory),
            fingerprint=fingerprint_of_model(model),
        )
        output = directory / "demo-output" / "adapters" / name
        output.mkdir(parents=True)
        made.write(output)
    return directory


@pytest.fixture(scope="session")
def merged(root):
    """What 02_merge.py prints and writes."""
    return run_sample(root, *COMMANDS["02_merge.py"])


def run_sample(root, *arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=root,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def run_here(root, monkeypatch, capsys):
    """`run_here(name)`: what a sample prints, run in this process, which has loaded torch."""

    def run(name):
        sample, *arguments = COMMANDS[name]
        monkeypatch.chdir(root)
        monkeypatch.syspath_prepend(SAMPLES)
        monkeypatch.setattr(sys, "argv", [sample, *arguments])
        runpy.run_path(sample, run_name="__main__")
        return capsys.readouterr().out

    return run


def load(name):
    """A sample as a module, without running what it does as a program."""
    specification = importlib.util.spec_from_file_location(name, SAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_readme_lists_every_sample_and_no_other():
    listed = re.findall(r"^\| `(\w+\.py)` \|", README, re.MULTILINE)

    assert sorted(listed) == sorted(file.name for file in SAMPLES.glob("*.py"))
    assert list(COMMANDS) == NUMBERED


def test_a_sample_fits_on_a_page():
    lengths = {name: len((SAMPLES / name).read_text().splitlines()) for name in NUMBERED}

    assert max(lengths.values()) <= 60, lengths


def test_peft_sample_loads_what_it_saved(root):
    done = run_sample(root, *COMMANDS["01_peft.py"])

    assert done.returncode == 0, done.stderr
    trainable, loaded = done.stdout.splitlines()
    # 384 channels of query, key and value in six layers, and a head of two labels.
    assert f"trainable params: {18 * 384 + 2 * 385:,} " in trainable
    assert loaded == "saved and loaded: the logits differ by 0.0e+00"


def test_merge_sample_predicts_the_adapters_label_in_plain_transformers(merged):
    assert merged.returncode == 0, merged.stderr
    *predictions, parity = merged.stdout.splitlines()
    assert [re.search(r"'label': '(\w+)'", line)[1] for line in predictions] == ["maybe"] * 2
    assert parity.startswith("parity: passed, ")


def test_switchable_sample_switches(run_here):
    printed = run_here("03_switchable.py")

    # Without an adapter there is no head either; the graph has that of the first one.
    assert [line.split() for line in printed.splitlines()] == [
        ["base", str(WINNERS["topic"])],
        ["first", str(WINNERS["topic"])],
        ["second", str(WINNERS["part-of-speech"])],
    ]


def test_bank_sample_answers_each_row_with_its_adapter(run_here):
    printed = run_here("05_bank.py")

    # The base model has no head of its own; the bank has that of the first adapter.
    first, second = (LABELS[WINNERS[name]] for name in ("topic", "part-of-speech"))
    assert [line.split()[:2] for line in printed.splitlines()] == [
        ["first", first],
        ["second", second],
        ["base", first],
        ["third", second],
    ]


def test_parity_sample_passes_what_is_right(root, merged):
    assert merged.returncode == 0, merged.stderr
    sample, artifact, report = COMMANDS["04_parity_in_ci.py"]

    done = run_sample(root, sample, artifact, report)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "passed"
    assert json.loads((root / report / "parity.json").read_text())["verdict"] == "passed"
    assert 'failures="0"' in (root / f"{report}.xml").read_text()


def test_parity_sample_fails_what_is_wrong(root, merged, tmp_path):
    assert merged.returncode == 0, merged.stderr
    sample, artifact, _ = COMMANDS["04_parity_in_ci.py"]
    wrong = tmp_path / "wrong"
    shutil.copytree(root / artifact, wrong)
    spoil_bias(wrong)
    Artifact.write(wrong, Artifact.read(root / artifact).manifest)

    done = run_sample(root, sample, wrong, tmp_path / "report")

    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == "FAILED"
    assert 'failures="0"' not in (tmp_path / "report.xml").read_text()


def test_parity_sample_tells_damage_from_a_mistake(root, merged, tmp_path):
    assert merged.returncode == 0, merged.stderr
    sample, artifact, _ = COMMANDS["04_parity_in_ci.py"]
    damaged = tmp_path / "damaged"
    shutil.copytree(root / artifact, damaged)
    spoil_bias(damaged)

    done = run_sample(root, sample, damaged, tmp_path / "report")

    assert done.returncode == 4, done.stderr
    assert done.stdout.splitlines()[-1] == "broken"


def spoil_bias(directory):
    from safetensors.numpy import load_file, save_file

    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.bias"] = tensors["classifier.bias"] + np.float32(0.01)
    save_file(tensors, file, {"format": "pt"})


# The demo, without the minutes it trains


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """The demo's modules by name, in an empty directory."""
    monkeypatch.syspath_prepend(SAMPLES)
    monkeypatch.chdir(tmp_path)
    modules = {name: load(name) for name in ("demo_steps", "demo_encoder", "demo_chat", "demo")}
    return SimpleNamespace(
        **modules, main=modules["demo"].main, OUTPUT=modules["demo_steps"].OUTPUT
    )


@pytest.fixture
def calls(demo, monkeypatch):
    """What each `step` was given; none is run, each answers as if all went well."""
    made = []
    answers = {
        "train": {"validation_accuracy": 0.9, "head_only_accuracy": 0.5}
        | {"validation_loss": 1.5, "base_loss": 4.5},
        "run": {"predictions": [{"text": "t", "adapter": "a", "label": "l", "score": 0.5}]},
        "chat": {"chat": demo.demo_chat.ANSWER, "base": "Tigers are large."},
        "parity": {"verdict": "passed", "checks": [1, 2], "runner": "r", "margin": 0.5},
    }

    def step(title, *arguments, may_not_run=False):
        made.append(SimpleNamespace(title=title, arguments=arguments, may_not_run=may_not_run))
        if "--chat" in arguments:
            text = answers["chat"][arguments[arguments.index("--adapter") + 1]]
            return {"predictions": [{"generated": text}]}
        return answers.get(arguments[0], {})

    for module in (demo.demo_steps, demo.demo_encoder, demo.demo_chat, demo.demo):
        monkeypatch.setattr(module, "step", step)
    for module in (demo.demo_encoder, demo.demo_chat):
        monkeypatch.setattr(module, "judge", demo.demo_steps.judge)
    both = answers["chat"]
    monkeypatch.setattr(demo.demo_chat, "ask_genai", lambda package: (both["chat"], both["base"]))
    monkeypatch.setattr(demo.demo, "encoder", demo.demo_encoder.encoder)
    monkeypatch.setattr(demo.demo, "chat", demo.demo_chat.chat)
    return SimpleNamespace(made=made, answers=answers)


def parse(arguments):
    """The options a command line sets; click refuses what a command does not have."""
    name, *rest = arguments
    command = app.get_command(click.Context(app), name)
    return command.make_context(name, [*rest, "--json"]).params


def test_every_command_of_the_demo_can_be_called(demo, calls):
    demo.main()

    used = [made.arguments[0] for made in calls.made]
    assert used == [
        *("doctor", "train", "train", "inspect", "merge", "onnx", "onnx", "onnx", "trt", "run"),
        *["parity"] * 5,
        *("train", "onnx", "onnx", "package", "run", "run", "package", "run", "run"),
        *["parity"] * 2,
    ]
    for made in calls.made:
        parse(made.arguments)  # raises for an option that the command does not have


def test_a_command_that_does_not_exist_would_be_noticed():
    with pytest.raises(click.UsageError, match="No such option"):
        parse(("merge", "-a", "adapter", "-o", "out", "--modes"))


def test_each_step_of_the_demo_reads_what_an_earlier_one_wrote(demo, calls):
    demo.main()

    written = set()
    for made in calls.made:
        paths = {word.rpartition("=")[2] for word in made.arguments if f"{demo.OUTPUT}/" in word}
        options = parse(made.arguments)
        new = {str(options[name]) for name in ("output", "report") if options.get(name)}
        assert paths - new <= written, made.title
        assert not new & written, made.title
        written |= new


def test_demo_trains_on_files_that_are_there(demo, calls):
    demo.main()

    trained = [parse(made.arguments) for made in calls.made if made.arguments[0] == "train"]
    for options in trained:
        for name in ("data", "validation"):
            first = json.loads(Path(options[name]).read_text().splitlines()[0])
            assert {"text", "label"} <= first.keys() or "messages" in first


def test_demo_removes_an_earlier_output(demo, calls):
    (demo.OUTPUT / "old").mkdir(parents=True)

    demo.main()

    assert not (demo.OUTPUT / "old").exists()


def test_demo_fails_when_the_topic_adapter_learns_too_little(demo, calls):
    calls.answers["train"]["validation_accuracy"] = demo.demo_encoder.REACHED - 0.01

    with pytest.raises(SystemExit, match=r"topic: 81\.0% held-out, expected 82%"):
        demo.main()


@pytest.mark.parametrize(("adapter", "answer"), [("chat", "a tiger"), ("base", "person")])
def test_demo_fails_when_the_chat_adapter_makes_no_difference(demo, calls, adapter, answer):
    calls.answers["chat"][adapter] = answer

    with pytest.raises(SystemExit, match="run, chat-float32: expected 'person' from the adapter"):
        demo.main()


def test_demo_fails_when_a_verdict_fails(demo, calls):
    calls.answers["parity"]["verdict"] = "failed"

    with pytest.raises(SystemExit, match="parity failed: merged, onnx-folded, onnx-switch"):
        demo.main()


def test_demo_accepts_what_this_machine_cannot_run_and_says_so(demo, calls, capsys):
    calls.answers["parity"] |= {
        "verdict": "not run", "checks": [], "margin": None, "not_run": [{"reason": "no GPU"}],
    }  # fmt: skip

    demo.main()

    assert "not run: no GPU" in capsys.readouterr().out


def test_a_row_of_the_table_says_what_was_found(demo, calls):
    (demo.OUTPUT / "merged").mkdir(parents=True)
    (demo.OUTPUT / "merged" / "model.safetensors").write_bytes(b"0" * 1500)

    row = demo.demo_steps.judge("merged")

    page = f"{demo.OUTPUT}/parity/merged/parity.html"
    assert row == ("merged", "1.5 kB", "50% left", "passed: 2 checks in r", page)
    assert calls.made[0].may_not_run


def test_a_step_shows_the_command_and_gives_its_json(demo, capfd):
    told = demo.demo_steps.step("What can this machine do?", "doctor")

    assert "== What can this machine do?\n$ propulsion-export doctor\n" in capfd.readouterr().out
    assert isinstance(told, dict)
    assert told


@pytest.mark.parametrize("allowed", [False, True])
def test_only_a_step_that_may_not_run_may_end_with_3(demo, monkeypatch, allowed):
    answer = subprocess.CompletedProcess([], 3, stdout='{"verdict": "not run"}')
    monkeypatch.setattr(demo.demo_steps.subprocess, "run", lambda *arguments, **options: answer)

    if allowed:
        assert demo.demo_steps.step("t", "parity", may_not_run=True) == {"verdict": "not run"}
    else:
        with pytest.raises(SystemExit, match="the command ended with 3"):
            demo.demo_steps.step("t", "parity")


@pytest.mark.parametrize("may_not_run", [False, True])
def test_a_step_that_breaks_ends_the_demo(demo, may_not_run):
    with pytest.raises(SystemExit, match="the command ended with 4"):
        demo.demo_steps.step("t", "inspect", "nothing-here", may_not_run=may_not_run)
