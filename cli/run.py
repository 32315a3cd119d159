"""`propulsion-export run`: predict with an artifact."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from .console import Console, console_options
from .options import DIRECTORY, FILE, runner_option

_SHOWN = 4  # numbers of an embedding


@click.command(
    epilog='\b\nExample: propulsion-export run onnx/switchable --adapter topic --text "a large cat"'
)
@click.argument("artifact", metavar="DIR", type=DIRECTORY)
@click.option("--text", multiple=True, help="A text, a question or a prompt; repeatable.")
@click.option("--inputs", type=FILE, help="A text a line, or JSONL with `text`.")
@click.option(
    "--context", multiple=True, help="What a question is about: one for all, or one for each."
)
@click.option(
    "--adapter", multiple=True, metavar="NAME", help="One for all texts, or one for each."
)
@click.option("--max-new-tokens", type=int, help="Of generated text, at most.  [default: 128]")
@click.option(
    "--temperature",
    type=float,
    help="Draw tokens, likely ones more (below 1) or less often.  [default: the likeliest each]",
)
@click.option("--top-k", type=int, help="Draw from so many of the likeliest tokens.")
@click.option("--top-p", type=float, help="Draw from the likeliest that have this probability.")
@click.option("--seed", type=int, help="Of the drawing.  [default: another text every time]")
@runner_option
@console_options
def command(
    console: Console, artifact: Path, text: tuple[str, ...], inputs: Path | None, **options: Any
) -> None:
    """Predict with an artifact, or generate text.

    Text behind a single prompt is written as it comes.
    """
    from propulsion_export.pipeline.run import predict

    alone = len(text) == 1 and inputs is None
    on_text = _print_piece if alone and not (console.json or console.quiet) else None
    predictions = predict(artifact, text=text, inputs=inputs, on_text=on_text, **options)
    console.result({"predictions": predictions}, _text(predictions, streamed=alone))
    for number, item in enumerate(predictions, 1):
        if item.get("stopped") == "length" and len(item["tokens"]) < _asked(options):
            console.note(f"text {number}: stopped, the model has no more positions")


def shown(prediction: Mapping[str, Any]) -> str:
    """A prediction as people read it, on one line."""
    if "generated" in prediction:
        return "\\n".join(prediction["generated"].splitlines())
    if "label" in prediction:
        return f"{prediction['label']} ({prediction['score']:.1%})"
    if "tokens" in prediction:
        return " ".join(f"{token['word']}/{token['label']}" for token in prediction["tokens"])
    if "answer" in prediction:
        where = f"characters {prediction['start']} to {prediction['end']}"
        return f"{prediction['answer']} ({prediction['score']:.1%}, {where})"
    if "filled" in prediction:
        return ", ".join(prediction["filled"])
    numbers = prediction["embedding"]
    first = " ".join(f"{number:g}" for number in numbers[:_SHOWN])
    return f"{first} ... ({len(numbers)} numbers, --json has them all)"


def _text(predictions: Sequence[Mapping[str, Any]], *, streamed: bool) -> str:
    if "generated" not in predictions[0]:
        return "\n".join(f"{p['text']}\t{p['adapter']}\t{shown(p)}" for p in predictions)
    if streamed:
        return ""  # it stands there already: this ends its line
    return "\n".join(
        f"{number}\t{item['adapter']}\t{shown(item)}" for number, item in enumerate(predictions, 1)
    )


def _asked(options: Mapping[str, Any]) -> int:
    """How many new tokens a text may have by the caller's will."""
    from propulsion_export.serving.generation import DEFAULT_NEW_TOKENS

    return options["max_new_tokens"] or DEFAULT_NEW_TOKENS


def _print_piece(number: int, piece: str) -> None:
    click.echo(piece, nl=False)  # flushes
