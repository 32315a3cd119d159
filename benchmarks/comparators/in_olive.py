"""Judge graphs by Olive's pass OnnxDiscrepancyCheck; runs in Olive's environment.

    python in_olive.py MERGED WORK < GRAPHS

MERGED is a checkpoint with the adapter folded; GRAPHS has a directory with a `model.onnx` in each
line. Each is judged by `olive run` with a workflow of this one pass. By default the pass has no
threshold and cannot fail; it gets 0.1, which Olive's main branch takes for `test_metrics: [mae]`,
and which is one of the two numbers that the pass counts by. The pass makes up inputs by the names
of dimensions that Olive's own graphs have, and lets PyTorch read no cache; so it gets a copy of the
graph whose dimensions are numbers: 2 rows of 16 tokens, and an empty cache. Writes a line of JSON
for each: the exit code, whether the graph was compared, and what was said.
"""

import json
import logging
import shutil
import sys
from pathlib import Path

import onnx
from olive.cli.launcher import main as olive

SIZES = {"batch": 2, "sequence": 16, "past_sequence": 0, "total_sequence": 16}
MOST = 0.1


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else ""
        self.messages.append(f"{record.getMessage()} {error}".strip())


def main() -> None:
    merged, work = map(Path, sys.argv[1:])
    for number, line in enumerate(sys.stdin):
        output = work / str(number)
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        write_fixed(Path(line.strip()), output / "graph")
        print(json.dumps(validate(merged, output)), flush=True)


def write_fixed(graph: Path, directory: Path) -> None:
    """Write a copy of a graph whose inputs have the sizes above."""
    shutil.copytree(graph, directory)
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    for value in model.graph.input:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_value = SIZES[dimension.dim_param]
    onnx.save(model, directory / "model.onnx")


def validate(merged: Path, output: Path) -> dict[str, object]:
    file = output / "workflow.json"
    file.write_text(json.dumps(workflow(merged, output)))
    code, heard = 0, Heard()
    logging.getLogger("olive").addHandler(heard)
    try:
        olive(["run", "--config", str(file)])
    except SystemExit as ended:
        code = ended.code or 0
    except Exception as raised:  # an interpreter prints it and ends with 1
        code = 1
        heard.messages.append(f"{type(raised).__name__}: {raised}")
    finally:
        logging.getLogger("olive").removeHandler(heard)
    compared = [message for message in heard.messages if "max_abs_error=" in message]
    failed = [message for message in heard.messages if "discrepancy check failed" in message]
    said = [*compared, *failed] or heard.messages[-3:]
    return {
        "code": code,
        "compared": bool(compared or failed),
        "failed": bool(failed),
        "said": " / ".join(said).replace("\n", " "),
    }


def workflow(merged: Path, output: Path) -> dict[str, object]:
    check = {
        "type": "OnnxDiscrepancyCheck",
        "reference_model_path": str(merged),
        "max_mae": MOST,
    }
    system = {
        "type": "LocalSystem",
        "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
    }
    return {
        "input_model": {"type": "ONNXModel", "model_path": str(output / "graph" / "model.onnx")},
        "systems": {"local": system},
        "target": "local",
        "log_severity_level": 1,
        "passes": {"check": check},
        "cache_dir": str(output / "cache"),
        "output_dir": str(output / "model"),
    }


if __name__ == "__main__":
    main()
