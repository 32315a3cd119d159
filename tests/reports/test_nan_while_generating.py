"""A model that computes NaN while it generates printed nothing, or garbage, with exit code 0.

An overflow does the same, and so do outputs of other tasks that are infinite. Minus infinity is one
too, but for tokens that a model rules out.
"""

import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.cli import main
from propulsion_export.errors import ArtifactError
from propulsion_export.pipeline.run import predict
from propulsion_export.serving.generation import Settings
from propulsion_export.serving.session import Session
from propulsion_export.serving.token_choice import TokenChooser
from propulsion_export.serving.token_sampling import Sampling

# The second text is longer: it comes to a position before the first does.
TEXTS = ("ba di", "fol gan ba ke di do ba di ke gan")
NEW = 12
READ = (3, 11)  # tokens of the prompts
POSITIONS = {"gpt2": "transformer.wpe.weight", "bart": "model.decoder.embed_positions.weight"}


@pytest.fixture(scope="module")
def merged(make_world, tmp_path_factory):
    """`merged(kind, task, change)`: a merged checkpoint, `(name, index, value)` of it changed."""
    from propulsion_export.pipeline.merge import merge

    @cache
    def plain(kind, task=None):
        directory = tmp_path_factory.mktemp("plain") / kind
        merge(make_world(kind, task).one, directory, task=task or "auto")
        return directory

    def make(kind, task=None, change=None):
        if change is None:
            return plain(kind, task)
        directory = tmp_path_factory.mktemp("changed") / kind
        shutil.copytree(plain(kind, task), directory)
        _change(directory, *change)
        return directory

    return make


def _change(directory, name, index, value):
    from safetensors.numpy import load_file, save_file

    manifest = Artifact.read(directory).manifest
    file = directory / "model.safetensors"
    weights = load_file(file)
    weights[name][index] = value
    save_file(weights, file, metadata={"format": "pt"})
    Artifact.write(directory, manifest)


def _generate(directory, texts=TEXTS, **options):
    return Session(directory)(list(texts), settings=Settings(new_tokens=NEW, **options))


def _code(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code


# Generated text


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.7)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_text_stops_where_its_logits_are_no_numbers(merged, value, sampling):
    options = {} if sampling is None else {"sampling": sampling, "seed": 1}
    right = _generate(merged("gpt2"), **options)

    # Only the second text comes to this position within 12 tokens.
    replies = _generate(merged("gpt2", change=(POSITIONS["gpt2"], READ[1] + 4, value)), **options)

    assert [reply.has_nan for reply in replies] == [False, True]
    assert replies[1].prediction["stopped"] == "nan"
    assert len(replies[1].prediction["tokens"]) == 5
    assert replies[1].prediction["tokens"] == right[1].prediction["tokens"][:5]
    assert replies[0].prediction == right[0].prediction
    # The twin: the sound checkpoint has nothing of the kind.
    assert not any(reply.has_nan for reply in right)


def test_so_does_the_text_of_an_encoder_decoder(merged):
    # The first two rows of BART's table are no position's.
    replies = _generate(merged("bart", change=(POSITIONS["bart"], 2 + 1, np.nan)))

    right = [reply.prediction["tokens"] for reply in _generate(merged("bart"))]
    assert [reply.prediction["tokens"] for reply in replies] == [tokens[:1] for tokens in right]
    assert [reply.has_nan for reply in replies] == [len(tokens) > 0 for tokens in right]
    assert any(right)


def test_nan_in_the_prompt_leaves_no_text(merged):
    directory = merged("gpt2", change=(POSITIONS["gpt2"], READ[1] - 1, np.nan))
    pieces = []

    first, second = _generate(directory, on_text=lambda number, piece: pieces.append(number))

    assert (second.prediction["tokens"], second.prediction["generated"]) == ([], "")
    assert second.has_nan
    # The first text goes on until it comes to that position itself.
    assert len(first.prediction["tokens"]) == READ[1] - READ[0]
    assert set(pieces) == {0}


def test_run_refuses_it_and_says_where(merged, capsys):
    directory = merged("gpt2", change=(POSITIONS["gpt2"], READ[1] + 4, np.nan))

    code = _code("run", str(directory), "--text", TEXTS[0], "--text", TEXTS[1],
                 "--max-new-tokens", str(NEW))  # fmt: skip

    told = capsys.readouterr()
    assert code == 4
    assert (
        told.err.count("computes NaN or infinity with 'one' for text 2, at generated token 6") == 1
    )
    assert len(told.err.strip().splitlines()) == 1
    assert "text 1" not in told.err
    assert _code("run", str(directory), "--text", TEXTS[0], "--max-new-tokens", str(NEW)) == 0


def test_the_end_of_text_that_was_streamed_is_an_error(merged, capsys):
    directory = merged("gpt2", change=(POSITIONS["gpt2"], READ[1] + 4, np.nan))
    [_, right] = _generate(merged("gpt2"))

    code = _code("run", str(directory), "--text", TEXTS[1], "--max-new-tokens", str(NEW))

    told = capsys.readouterr()
    assert code == 4
    assert right.prediction["generated"].startswith(told.out.rstrip("\n"))
    assert told.out.strip()


def test_only_the_adapter_with_nan_is_refused_in_a_graph(exported, tmp_path):
    from safetensors.numpy import load_file, save_file

    directory = shutil.copytree(exported("llama", "switchable"), tmp_path / "onnx")
    file = directory / "adapters" / "two.safetensors"
    feeds = load_file(file)
    feeds["propulsion_scales"][3] = np.nan
    save_file(feeds, file)
    Artifact.write(directory, Artifact.read(exported("llama", "switchable")).manifest)

    with pytest.raises(
        ArtifactError, match="computes NaN or infinity with 'two' for text 2, at generated tok"
    ):
        predict(directory, text=TEXTS, adapter=["one", "two"], max_new_tokens=3)
    replies = Session(directory)(list(TEXTS), ["one", "two"], settings=Settings(new_tokens=3))
    sound = Session(exported("llama", "switchable"))(
        list(TEXTS), ["one", "two"], settings=Settings(new_tokens=3)
    )
    assert [reply.has_nan for reply in replies] == [False, True]
    assert replies[0].prediction == sound[0].prediction


def test_the_sample_server_answers_with_an_error_for_that_row(merged, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "samples")
    from batching import Row, answer

    directory = merged("gpt2", change=(POSITIONS["gpt2"], READ[1] + 4, np.nan))

    first, second = answer(Session(directory), [Row(text, "one") for text in TEXTS])

    # A text of 128 tokens comes there from any prompt.
    assert isinstance(first, ArtifactError)
    assert "computes NaN" in str(second)


# Other tasks


OUTPUTS = [
    ("fill-mask", "cls.predictions.bias", slice(None)),
    ("feature-extraction", "encoder.layer.1.output.LayerNorm.bias", 3),
    ("text-classification", "classifier.bias", 1),
    ("text-classification", "classifier.bias", slice(None)),
    ("token-classification", "classifier.bias", 0),
    ("question-answering", "qa_outputs.bias", 0),
]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("task", "name", "index"), OUTPUTS)
def test_an_infinite_output_is_refused_as_nan_is(merged, task, name, index, value):
    text, more = "ba [MASK] di", {}
    if task == "question-answering":
        more = {"context": ["fol gan ba ke"]}
    directory = merged("bert", task, (name, index, value))

    with pytest.raises(ArtifactError, match="computes NaN or infinity with 'one' for text 1"):
        predict(directory, text=[text], **more)
    [reply] = Session(directory)([text], **more)
    assert (reply.has_nan, reply.prediction) == (True, None)
    assert predict(merged("bert", task), text=[text], **more)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_token_of_a_vocabulary_is_enough(merged, value):
    directory = merged("bert", "fill-mask", ("cls.predictions.bias", 7, value))

    with pytest.raises(ArtifactError, match="computes NaN or infinity with 'one' for text 1"):
        predict(directory, text=["ba [MASK] di"])


def test_a_token_that_is_ruled_out_is_no_error(merged):
    [right] = predict(merged("bert", "fill-mask"), text=["ba [MASK] di"])

    ruled_out = merged("bert", "fill-mask", ("cls.predictions.bias", 0, -np.inf))

    assert predict(ruled_out, text=["ba [MASK] di"]) == [right]


@pytest.mark.parametrize("sampling", [None, Sampling(top_p=0.9)], ids=["greedy", "sampled"])
def test_a_row_without_a_likeliest_token_is_lost_and_no_other(sampling):
    pick = Settings(sampling=sampling, seed=1 if sampling else None).choose(range(5))
    choose = TokenChooser([np.array([1])] * 5, [[]] * 5, pick)

    picked = choose(
        np.array(
            [
                [-np.inf, 2, -np.inf],
                [-np.inf, -np.inf, -np.inf],
                [0, np.inf, 0],
                [0, np.nan, -np.inf],
                [-np.inf, -np.inf, -9],
            ],
            np.float32,
        )
    )

    assert choose.lost.tolist() == [False, True, True, True, False]
    assert picked[[0, 4]].tolist() == [1, 2]


def test_a_row_of_a_list_is_told_alone_by_the_sample_server(merged, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "samples")
    from server import content

    from batching import Row, answer

    directory = merged("bert", "text-classification", ("classifier.bias", slice(None), -np.inf))
    lost, sound = Session(directory), Session(merged("bert", "text-classification"))

    def session(texts, adapter):
        return [(lost if text == "ba" else sound)([text], adapter)[0] for text in texts]

    answers = answer(session, [Row(text, "one") for text in ("di", "ba", "ke")])

    (one, status), (error, lost_status), (two, also) = map(content, answers)
    assert (status, lost_status, also) == (200, 500, 200)
    assert error == {
        "error": "the adapter 'one' computes NaN or infinity for this text",
        "status": 500,
    }
    assert [one["prediction"], two["prediction"]] == [
        sound([text])[0].prediction for text in ("di", "ke")
    ]
