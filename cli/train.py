"""`propulsion-export train`: train an adapter on labelled text, or on text to generate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import click

from propulsion_export.base_model.tasks import TASKS, TRAINED_TASKS
from propulsion_export.errors import UsageError

from .console import Console, console_options
from .options import FILE, output_options, trust_option


class TrainArguments(TypedDict):
    """The options that go to `TrainOptions` as they are."""

    task: str
    validation: Path | None
    text_column: str | None
    label_column: str | None
    chat_template: Path | None
    placement: str
    degree: float
    train_bias: bool
    epochs: int
    batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    max_length: int | None
    packing: bool
    seed: int
    early_stopping: int | None
    gradient_checkpointing: bool
    dtype: Literal["float32", "bfloat16"]
    resume: bool
    force: bool
    trust_remote_code: bool


@click.command(
    epilog="\b\nExample: propulsion-export train -m ./all-MiniLM-L6-v2 -d train.jsonl "
    "--validation held-out.jsonl -o adapters/topic"
)
@click.option("-m", "--model", required=True, help="Base model: path, GGUF file or name.")
@click.option(
    "-d",
    "--data",
    required=True,
    help="JSONL, CSV, Parquet or text file, a directory of these, or owner/name on a hub.",
)
@click.option(
    "--task",
    type=click.Choice(TRAINED_TASKS),
    default="text-classification",
    show_default=True,
    help="What the adapter is trained for.",
)
@click.option("--validation", type=FILE, help="File to validate on.  [default: a tenth of DATA]")
@click.option("--text-column", help="Column of the inputs.  [default: text, tokens, or prompt]")
@click.option(
    "--label-column",
    help="Column of the labels or responses.  [default: label, labels, or response; to generate, "
    "without responses, the texts themselves are learnt]",
)
@click.option(
    "--chat-template",
    type=FILE,
    help="File with the chat template to learn messages with.  [default: the base model's]",
)
@click.option(
    "--placement",
    default="all",
    show_default=True,
    help="Modules to scale: attention, all, or a regex of module paths.",
)
@click.option(
    "--degree", type=float, default=15, show_default=True, help="Power of the trained vectors."
)
@click.option("--train-bias", is_flag=True, help="Train the biases of the scaled modules too.")
@click.option(
    "--epochs", type=int, default=3, show_default=True, help="Passes over the training data."
)
@click.option(
    "--batch-size",
    type=int,
    default=32,
    show_default=True,
    help="Rows per step, over all processes.",
)
@click.option(
    "--gradient-accumulation-steps",
    type=int,
    default=1,
    show_default=True,
    help="Parts that each batch is split into, to save memory.",
)
@click.option(
    "--learning-rate",
    type=float,
    default=1e-3,
    show_default=True,
    help="Learning rate of the vectors and biases.",
)
@click.option(
    "--head-learning-rate",
    type=float,
    help="Learning rate of the classifier head.  [default: 0.01]",
)
@click.option(
    "--max-length", type=int, help="Most tokens per text.  [default: 128, or 512 to generate]"
)
@click.option(
    "--packing",
    is_flag=True,
    help="Pack passages into blocks of --max-length tokens, none attending to another. "
    "text-generation only; a model that cannot keep them apart is refused.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed for the training and the split."
)
@click.option(
    "--early-stopping",
    type=int,
    metavar="EPOCHS",
    help="Stop after so many epochs without improvement; keeps the best.",
)
@click.option(
    "--gradient-checkpointing", is_flag=True, help="Compute activations twice, to save memory."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Type of the frozen base model.",
)
@click.option(
    "--no-head-only", is_flag=True, help="Do not train a classifier head alone to compare with."
)
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@output_options
@trust_option
@console_options
def command(
    console: Console,
    *,
    model: str,
    data: str,
    output: Path,
    no_head_only: bool,
    head_learning_rate: float | None,
    **options: Unpack[TrainArguments],
) -> None:
    """Train a Propulsion adapter on labelled text, or on text to generate.

    To generate, it learns the texts of a column `text`, or responses to prompts, each with an
    end-of-sequence token, or what the assistant says in a column `messages`; no head is trained.

    Writes the PEFT adapter, metrics.json, loss-curve.png and a model card. Under `accelerate
    launch` several processes train together.
    """
    from propulsion_export.training import TrainOptions, train
    from propulsion_export.training.processes import started_processes

    if not started_processes().is_main:  # of several processes, only the first prints
        console = Console(json=False, quiet=True)
    _check_head_options(options["task"], head_learning_rate, no_head_only=no_head_only)
    chosen = TrainOptions(
        head_only=not no_head_only,
        head_learning_rate=(
            TrainOptions.head_learning_rate if head_learning_rate is None else head_learning_rate
        ),
        **options,
    )
    with console.progress() as progress:
        result = train(model, data, output, options=chosen, progress=progress)
    for note in result.notes:
        console.note(note)
    console.result(
        {"adapter": str(result.directory), **result.metrics}, _text(result.metrics, output)
    )


def _check_head_options(task: str, learning_rate: float | None, *, no_head_only: bool) -> None:
    """Refuse options for a classifier head where none is trained."""
    given = {"--head-learning-rate": learning_rate is not None, "--no-head-only": no_head_only}
    found = [option for option, is_given in given.items() if is_given]
    if found and TASKS[task].generates:
        raise UsageError(
            *(
                f"{option}: does nothing with --task {task}, which trains no head"
                for option in found
            ),
            remedy="Leave it out.",
        )


def _text(metrics: Mapping[str, Any], output: Path) -> str:
    if "validation_perplexity" in metrics:
        loss, perplexity = metrics["validation_loss"], metrics["validation_perplexity"]
        base, of_base = metrics["base_loss"], metrics["base_perplexity"]
        return (
            f"{output}: held-out loss {loss:.4f}, perplexity {perplexity:.4g} "
            f"(base model {base:.4f}, {of_base:.4g})"
        )
    accuracy = metrics["validation_accuracy"]
    alone = metrics.get("head_only_accuracy")
    beside = f" (head alone {alone:.1%})" if alone is not None else ""
    return f"{output}: held-out accuracy {accuracy:.1%}{beside}"
