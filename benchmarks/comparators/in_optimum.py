"""Judge graphs by optimum's own validation of an export; runs in optimum's environment.

    python in_optimum.py KIND DTYPE MERGED WORK < GRAPHS

MERGED is a checkpoint with the adapter folded; GRAPHS has a directory with a `model.onnx` in each
line. For each, `optimum-cli export onnx` exports MERGED into a directory below WORK, with one
thing changed: before the validation, the given graph is put where optimum's exporter has written
its own, with its dimensions named as there. So the validation, its inputs, its tolerance and the
exit code are those of `optimum-cli`. Writes a line of JSON for each: the exit code, whether the
graph was compared, and what was said of it.
"""

import json
import shutil
import sys
from pathlib import Path

import onnx
from optimum.commands.optimum_cli import main as optimum_cli
from optimum.exporters.onnx import convert

TASKS = {"encoder": "text-classification", "decoder": "text-generation-with-past"}
DTYPES = {"float32": "fp32", "float16": "fp16"}


def main() -> None:
    kind, dtype, merged, work = sys.argv[1:]
    for number, line in enumerate(sys.stdin):
        output = Path(work) / str(number)
        arguments = ["export", "onnx", "--model", merged, "--task", TASKS[kind]]
        arguments += ["--dtype", DTYPES[dtype], str(output)]
        print(json.dumps(validate(Path(line.strip()), arguments)), flush=True)
        shutil.rmtree(output, ignore_errors=True)


def validate(graph: Path, arguments: list[str]) -> dict[str, object]:
    judge = convert.validate_models_outputs
    validated: list[str] = []

    def exchanged(*arguments: object, output_dir: Path, **options: object) -> None:
        put(graph, Path(output_dir))
        try:
            judge(*arguments, output_dir=output_dir, **options)
        except Exception as found:
            validated.append(f"{type(found).__name__}: {found}")
            raise
        validated.append("")

    convert.validate_models_outputs = exchanged
    sys.argv = ["optimum-cli", *arguments]
    code = 0
    try:
        optimum_cli()
    except SystemExit as ended:
        code = ended.code or 0
    except Exception as raised:  # an interpreter prints it and ends with 1
        code = 1
        print(f"{type(raised).__name__}: {raised}", file=sys.stderr)
    finally:
        convert.validate_models_outputs = judge
    return {"code": code, "validated": bool(validated), "said": "".join(validated)}


def put(graph: Path, directory: Path) -> None:
    """Put a graph in the place of optimum's own, its dimensions named as there: it checks names."""
    own = onnx.load(directory / "model.onnx", load_external_data=False).graph
    shapes = {value.name: value.type.tensor_type.shape for value in (*own.input, *own.output)}
    for file in graph.glob("model.onnx.*"):
        shutil.copyfile(file, directory / file.name)
    model = onnx.load(graph / "model.onnx", load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        found = value.type.tensor_type.shape
        if value.name in shapes and len(found.dim) == len(shapes[value.name].dim):
            found.CopyFrom(shapes[value.name])
    onnx.save(model, directory / "model.onnx")


if __name__ == "__main__":
    main()
