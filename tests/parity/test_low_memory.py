"""Layer by layer and on a device: the same verdict, in the memory of two layers."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.cli import main
from propulsion_export.pipeline.parity import check_parity

# The checkpoint is mapped into memory. What a process has of files is the kernel's to take back, so
# that only what it holds besides (RssAnon) counts.
JUDGE_IN_A_PROCESS = """
    import re, sys, threading, time
    from pathlib import Path
    from types import SimpleNamespace
    import numpy as np
    from propulsion_export.adapters.adapter import Adapter
    from propulsion_export.adapters.scales import Scale
    from propulsion_export.base_model.loading import load_base
    from propulsion_export.parity.by_layer import compute_by_layer
    from propulsion_export.parity.forwards import compute_whole
    from propulsion_export.parity.inputs import decoder_inputs
    from propulsion_export.parity.oracle import compute_oracle

    def held():
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", status)[1])

    def judge(directory, compute):
        base = load_base(str(directory), task="text-generation")
        width = base.model.config.hidden_size
        scales = {
            f"model.layers.{place}.self_attn.o_proj": Scale(np.linspace(0.5, 1.5, width))
            for place in range(base.model.config.num_hidden_layers)
        }
        manifest = SimpleNamespace(mode="switchable", kind="onnx", dtype="float32", layout={})
        return compute_oracle(
            SimpleNamespace(manifest=manifest, feeds=lambda name: {}),
            base,
            [Adapter("one", scales)],
            decoder_inputs(base.model.config, seed=0, longest=8),
            lambda *_: None,
            compute=compute,
            draft=lambda prompt, steps: (np.full((3, steps), 7), np.ones((3, steps))),
            steps=4,
        )

    compute = {"layers": compute_by_layer, "whole": compute_whole}[sys.argv[3]]("cpu")
    judge(Path(sys.argv[1]), compute)
    before, peaks, over = held(), [], threading.Event()

    def watch():
        while not over.is_set():
            peaks.append(held())
            time.sleep(0.001)

    watching = threading.Thread(target=watch)
    watching.start()
    judge(Path(sys.argv[2]), compute)
    over.set()
    watching.join()
    print(max(peaks) - before)
"""


def errors(report):
    return [
        (check.case, check.adapter, check.passed, output.output, output.error, output.allowed)
        for check in report.checks
        for output in check.outputs
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_decoder_is_judged_the_same_layer_by_layer(kind, exported):
    directory = exported(kind, "switchable")

    layered = check_parity(directory, low_memory=True, device="cpu")

    assert layered.passed
    assert errors(layered) == errors(check_parity(directory))


def test_encoder_is_judged_the_same_layer_by_layer(switchable):
    layered = check_parity(switchable, low_memory=True)

    assert layered.passed
    assert errors(layered) == errors(check_parity(switchable))


def test_wrong_graph_fails_layer_by_layer_too(exported, tmp_path, make_world):
    """The twin: exchanged adapters."""
    shutil.copytree(exported("llama", "folded"), tmp_path / "wrong")
    other = make_world("llama").two
    directory = tmp_path / "wrong"
    exchange_recorded_adapter(directory, other)

    report = check_parity(directory, low_memory=True)

    assert not report.passed
    assert {"parity", "greedy"} <= {check.case for check in report.checks if not check.passed}


def exchange_recorded_adapter(directory, other):
    """Let the manifest name another adapter than the one that is folded in."""
    file = directory / "propulsion.json"
    manifest = json.loads(file.read_text())
    del manifest["digest"]
    (entry,) = manifest["adapters"].values()
    entry |= {"digest": Adapter.read(other).digest, "source": str(other)}
    file.write_text(json.dumps(manifest))


def test_model_of_two_stacks_is_refused_layer_by_layer(exported, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["parity", str(exported("t5", "folded")), "--low-memory"])

    assert ended.value.code == 2
    assert "--low-memory: T5ForConditionalGeneration is not one stack" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_here_is_told_in_one_line(folded, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["parity", str(folded), "--device", "cuda"])

    assert ended.value.code == 3
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--device cuda: " in line
    assert "--device cpu" in line


def test_the_cpu_can_be_asked_for(folded, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["parity", str(folded), "--device", "cpu"])

    assert ended.value.code == 0


# Of a gigabyte in 20 layers, and of a billion parameters in 16 of the size that Llama 3.2 1B has.
GIGABYTE = {
    "hidden_size": 1024, "num_hidden_layers": 20, "num_attention_heads": 16,
    "num_key_value_heads": 16, "intermediate_size": 2816,
}  # fmt: skip
BILLION = {
    "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 8192,
}  # fmt: skip


@pytest.fixture
def two_llamas(tmp_path, tiny_model):
    """`two_llamas(**config)`: a small one, which loads what the libraries take, and a large one.

    Also the size of one of its layers in float64, in bytes.
    """

    def make(**config):
        tiny_model("llama").save_pretrained(tmp_path / "small")
        settings = {"vocab_size": 1000, "head_dim": 64, "initializer_range": 0.02} | config
        model = tiny_model("llama", **settings)
        model.save_pretrained(tmp_path / "large")
        layer = sum(p.numel() for p in model.model.layers[0].parameters())
        return tmp_path / "small", tmp_path / "large", 8 * layer

    yield make
    for file in (tmp_path / "large").glob("*.safetensors"):
        file.unlink()


def layers_taken(llamas, how):
    """The most memory that the oracle of the large one takes, in layers in float64."""
    small, large, layer = llamas
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(JUDGE_IN_A_PROCESS), small, large, how],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    print(f"{how}: {int(ended.stdout) / layer:.2f} layers in float64")  # shown by pytest -s
    return int(ended.stdout) / layer


ONLY_LINUX = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="only Linux tells memory so"
)


@pytest.mark.slow
@ONLY_LINUX
def test_a_model_is_judged_in_the_memory_of_two_layers(two_llamas):
    llamas = two_llamas(**GIGABYTE)

    assert layers_taken(llamas, "layers") < 2
    assert layers_taken(llamas, "whole") > 18


@pytest.mark.slow
@ONLY_LINUX
def test_a_billion_parameters_are_judged_in_the_memory_of_two_layers(two_llamas):
    llamas = two_llamas(**BILLION)

    assert layers_taken(llamas, "layers") < 2
