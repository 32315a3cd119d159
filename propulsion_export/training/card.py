"""The model card of an adapter and the plot of its training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from propulsion_export.base_model.gguf.source import find_gguf
from propulsion_export.base_model.tasks import TASKS


def write_loss_curve(
    file: Path, losses: Sequence[tuple[float, float]], metrics: Mapping[str, Any]
) -> None:
    """Plot the training loss and the validation results over the epochs, as PNG.

    Args:
        file: the PNG to write.
        losses: points (epoch, training loss).
        metrics: the content of `metrics.json`; the task, the epochs and the base model's loss are
            plotted.
    """
    # Not pyplot: a Figure needs no display and leaves no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="epoch", ylabel="training loss")
    axes.plot([epoch for epoch, _ in losses], [loss for _, loss in losses], color="tab:blue")
    draw = _draw_losses if TASKS[metrics["task"]].generates else _draw_accuracy
    draw(axes, metrics)
    axes.set_ylim(bottom=0)
    canvas.print_png(str(file))


def _draw_accuracy(axes: Any, metrics: Mapping[str, Any]) -> None:
    """Plot the accuracy on a second axis, from 0 to 1."""
    axes.yaxis.label.set_color("tab:blue")
    right = axes.twinx()
    right.set(ylabel="validation accuracy", ylim=(0, 1))
    right.yaxis.label.set_color("tab:orange")
    right.plot(*_by_epoch(metrics, "validation_accuracy"), color="tab:orange", marker="o")


def _draw_losses(axes: Any, metrics: Mapping[str, Any]) -> None:
    """Plot the validation loss beside the training loss, starting at the base model's loss."""
    axes.set_ylabel("loss")
    axes.lines[0].set_label("training")
    epochs, found = _by_epoch(metrics, "validation_loss")
    axes.plot(
        [0, *epochs],
        [metrics["base_loss"], *found],
        color="tab:orange",
        marker="o",
        label="validation (epoch 0: base model)",
    )
    axes.legend()


def _by_epoch(metrics: Mapping[str, Any], name: str) -> tuple[list[float], list[float]]:
    epochs = metrics["epochs"]
    return [entry["epoch"] for entry in epochs], [entry[name] for entry in epochs]


def model_card(metrics: Mapping[str, Any]) -> str:
    """The README of an adapter directory, with the header that model hubs read."""
    header = ModelCardData(
        library_name="peft",
        base_model=_hub_name(metrics["base_model"]),
        pipeline_tag=metrics["task"],
        tags=["propulsion", "propulsion-export"],
        metrics=[_measure(metrics)],
    )
    lines = ["---", header.to_yaml(), "---", ""]
    return "\n".join([*lines, *_description(metrics), *_results(metrics), *_usage(metrics)])


def _measure(metrics: Mapping[str, Any]) -> str:
    training = TASKS[metrics["task"]].training
    return "" if training is None else training.measure


def _hub_name(base_model: str) -> str | None:
    """The base model's name on a hub; None for a local path, which no hub could link."""
    return None if Path(base_model).is_absolute() else base_model


def _description(metrics: Mapping[str, Any]) -> list[str]:
    options, counts = metrics["options"], metrics["trainable_parameters"]
    trained = ", ".join(f"{count:,} in {kind}" for kind, count in counts.items() if count)
    head, labels = "", []
    if "labels" in metrics:
        head = ", and a task head"
        labels = [f"- Labels: {', '.join(f'`{label}`' for label in metrics['labels'])}"]
    return [
        f"# Propulsion adapter for {metrics['task']}",
        "",
        "Vectors that multiply the output channels of a frozen base model "
        f"([arXiv 2409.10927](https://arxiv.org/abs/2409.10927)){head}.",
        "",
        f"- Base model: `{metrics['base_model']}`, in {options['dtype']}",
        *labels,
        f"- Placement `{options['placement']}`, degree {options['degree']:g}",
        f"- Trained numbers: {trained}",
        f"- Seed {metrics['seed']}; {metrics['rows']['train']:,} training rows, "
        f"{metrics['rows']['validation']:,} validation rows ({metrics['validation_data']})",
        "",
    ]


def _results(metrics: Mapping[str, Any]) -> list[str]:
    measure = _measure(metrics)
    rows = [
        f"| {entry['epoch']} | {entry['train_loss']:.4f} | {entry['validation_loss']:.4f} "
        f"| {entry[f'validation_{measure}']:.4f} |"
        for entry in metrics["epochs"]
    ]
    verdict = _losses if measure == "perplexity" else _accuracies
    return [
        "## Results",
        "",
        verdict(metrics),
        "",
        f"| epoch | training loss | validation loss | validation {measure} |",
        "|---|---|---|---|",
        *rows,
        "",
        "![training and validation by epoch](loss-curve.png)",
        "",
    ]


def _accuracies(metrics: Mapping[str, Any]) -> str:
    head = metrics["head_only_accuracy"]
    compared = ""
    if head is not None:
        compared = f", against {head:.4f} for the task head alone on the frozen base model"
    found = f"{metrics['validation_accuracy']:.4f} (epoch {metrics['kept_epoch']})"
    return f"Validation accuracy {found}{compared}."


def _losses(metrics: Mapping[str, Any]) -> str:
    return (
        f"Validation loss {metrics['validation_loss']:.4f} a token, perplexity "
        f"{metrics['validation_perplexity']:.4f} (epoch {metrics['kept_epoch']}), against "
        f"{metrics['base_loss']:.4f} and {metrics['base_perplexity']:.4f} for the base model."
    )


def _place(base: str) -> str:
    """Where transformers finds a base model, as arguments of from_pretrained."""
    if find_gguf(base) is None:
        return json.dumps(base)
    file = Path(base)
    return f"{json.dumps(str(file.parent))}, gguf_file={json.dumps(file.name)}"


def _usage(metrics: Mapping[str, Any]) -> list[str]:
    auto_class, base = TASKS[metrics["task"]].auto_class, _place(metrics["base_model"])
    labels = f", num_labels={len(metrics['labels'])}" if "labels" in metrics else ""
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
        f"base = {auto_class}.from_pretrained({base}{labels})",
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
