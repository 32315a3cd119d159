"""Judge graphs by optimum's own validation of an export; runs in optimum's environment.

    python in_optimum.py KIND DTYPE MERGED WORK < GRAPHS

MERGED is a checkpoint with the adapter folded; GRAPHS has a directory with a `model.onnx` in each
line. For each, `optimum-cli export onnx` exports MERGED into a directory below WORK, with one
thing changed: before the validation, the given graph is put where optimum's exporter has written
its own. So the validation, its inputs, its tolerance and the exit code are those of `optimum-cli`.
Writes a line of JSON for each: the exit code, and what was said of the graph.
"""

import json
import logging
import shutil
import sys
from pathlib import Path

from optimum.commands.optimum_cli import main as optimum_cli
from optimum.exporters.onnx import convert

TASKS = {"encoder": "text-classification", "decoder": "text-generation-with-past"}
DTYPES = {"float32": "fp32", "float16": "fp16"}


class Heard(logging.Handler):
    """Keeps the warnings of a logger."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def main() -> None:
    kind, dtype, merged, work = sys.argv[1:]
    for number, line in enumerate(sys.stdin):
        output = Path(work) / str(number)
        arguments = ["export", "onnx", "--model", merged, "--task", TASKS[kind]]
        arguments += ["--dtype", DTYPES[dtype], str(output)]
        print(json.dumps(validate(Path(line.strip()), arguments)), flush=True)
        shutil.rmtree(output, ignore_errors=True)


def validate(graph: Path, arguments: list[str]) -> dict[str, object]:
    heard = Heard()
    logging.getLogger("optimum").addHandler(heard)
    judge, validated = convert.validate_models_outputs, []

    def exchanged(*arguments: object, output_dir: Path, **options: object) -> None:
        for file in graph.glob("model.onnx*"):
            shutil.copyfile(file, Path(output_dir) / file.name)
        validated.append(True)
        judge(*arguments, output_dir=output_dir, **options)

    convert.validate_models_outputs = exchanged
    sys.argv = ["optimum-cli", *arguments]
    code, error = 0, ""
    try:
        optimum_cli()
    except SystemExit as ended:
        code = ended.code or 0
    except Exception as raised:  # an interpreter prints it and ends with 1
        code, error = 1, f"{type(raised).__name__}: {raised}"
    finally:
        convert.validate_models_outputs = judge
        logging.getLogger("optimum").removeHandler(heard)
    said = [message for message in heard.messages if "ONNX export" in message]
    return {"code": code, "validated": bool(validated), "said": "\n".join([*said, error]).strip()}


if __name__ == "__main__":
    main()
