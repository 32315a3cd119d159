"""What a person reads about an adapter: a model card and a picture of its training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_AUTO_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}


def write_loss_curve(
    file: Path, losses: Sequence[tuple[float, float]], history: Sequence[Mapping[str, float]]
) -> None:
    """Draw training loss and validation accuracy over the epochs, as PNG."""
    # Not pyplot: a figure of its own needs no display and leaves no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left = figure.add_subplot(xlabel="epoch", ylabel="training loss")
    left.plot([epoch for epoch, _ in losses], [loss for _, loss in losses], color="tab:blue")
    left.set_ylim(bottom=0)
    left.yaxis.label.set_color("tab:blue")
    right = left.twinx()
    right.set(ylabel="validation accuracy", ylim=(0, 1))
    right.yaxis.label.set_color("tab:orange")
    right.plot(
        [entry["epoch"] for entry in history],
        [entry["validation_accuracy"] for entry in history],
        color="tab:orange",
        marker="o",
    )
    canvas.print_png(str(file))


def model_card(metrics: Mapping[str, Any]) -> str:
    """The README of an adapter directory, with the header that model hubs read."""
    # JSON strings are YAML strings, and need no other quoting.
    header = [
        "---",
        "library_name: peft",
        *_base_model(metrics["base_model"]),
        f"pipeline_tag: {metrics['task']}",
        "tags:",
        "- propulsion",
        "- propulsion-export",
        "metrics:",
        "- accuracy",
        "---",
    ]
    return "\n".join([*header, "", *_description(metrics), *_results(metrics), *_usage(metrics)])


def _base_model(source: str) -> list[str]:
    """A hub reads this field as a name of its own; a path on one machine is none."""
    return [] if Path(source).is_absolute() else [f"base_model: {json.dumps(source)}"]


def _description(metrics: Mapping[str, Any]) -> list[str]:
    options, counts = metrics["options"], metrics["trainable_parameters"]
    trained = ", ".join(f"{count:,} in {kind}" for kind, count in counts.items() if count)
    return [
        f"# Propulsion adapter for {metrics['task']}",
        "",
        "Vectors that multiply the output channels of a frozen base model "
        "([arXiv 2409.10927](https://arxiv.org/abs/2409.10927)), and a task head.",
        "",
        f"- Base model: `{metrics['base_model']}`, in {options['dtype']}",
        f"- Labels: {', '.join(f'`{label}`' for label in metrics['labels'])}",
        f"- Placement `{options['placement']}`, degree {options['degree']:g}",
        f"- Trained numbers: {trained}",
        f"- Seed {metrics['seed']}; {metrics['rows']['train']:,} training rows, "
        f"{metrics['rows']['validation']:,} validation rows ({metrics['validation_data']})",
        "",
    ]


def _results(metrics: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {entry['epoch']} | {entry['train_loss']:.4f} | {entry['validation_loss']:.4f} "
        f"| {entry['validation_accuracy']:.4f} |"
        for entry in metrics["epochs"]
    ]
    head = metrics["head_only_accuracy"]
    compared = ""
    if head is not None:
        compared = f", against {head:.4f} for the task head alone on the frozen base model"
    return [
        "## Results",
        "",
        f"Validation accuracy {metrics['validation_accuracy']:.4f} (epoch {metrics['kept_epoch']})"
        f"{compared}.",
        "",
        "| epoch | training loss | validation loss | validation accuracy |",
        "|---|---|---|---|",
        *rows,
        "",
        "![training loss and validation accuracy](loss-curve.png)",
        "",
    ]


def _usage(metrics: Mapping[str, Any]) -> list[str]:
    auto_class, base = _AUTO_CLASSES[metrics["task"]], json.dumps(metrics["base_model"])
    return [
        "## Use",
        "",
        "With PEFT:",
        "",
        "```python",
        "import propulsion_export  # makes the method known to PEFT",
        "from peft import PeftModel",
        f"from transformers import {auto_class}",
        "",
        f"base = {auto_class}.from_pretrained({base}, num_labels={len(metrics['labels'])})",
        'model = PeftModel.from_pretrained(base, "PATH/TO/THIS/DIRECTORY")',
        "```",
        "",
        "As a plain checkpoint, or as an ONNX model:",
        "",
        "```sh",
        "propulsion-export merge -a PATH/TO/THIS/DIRECTORY -o merged",
        "propulsion-export onnx -a PATH/TO/THIS/DIRECTORY -o onnx",
        "```",
        "",
    ]
