"""A base model's generation settings were ignored: `run` gave other tokens than transformers.

BART, Marian and many translation models need `forced_bos_token_id` or `forced_eos_token_id`, and
small decoders repeat themselves without `no_repeat_ngram_size` or `repetition_penalty`.
"""

import json
import shutil
from functools import cache

import numpy as np
import pytest

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.generation_settings import (
    APPLIED,
    GenerationSettings,
    first_decoder_token,
)
from propulsion_export.base_model.tokenizer.reading import read_serving_tokenizer
from propulsion_export.cli import main
from propulsion_export.errors import ArtifactError
from propulsion_export.pipeline.run import predict
from propulsion_export.serving.generation import Settings
from propulsion_export.serving.session import Session
from propulsion_export.serving.token_rules import Row, apply_rules, rules_of
from propulsion_export.serving.token_sampling import Sampling

# Of three lengths, so that a batch is padded; with repeated words for the rules about them.
TEXTS = ("ba ba ke ba ba ke ba", "di", "fol gan ba ke di do")
NEW = 12
WIDTH = 50


@pytest.fixture(scope="module")
def merged(make_world, tmp_path_factory):
    """`merged(kind, **settings)`: a merged checkpoint with these generation settings."""
    from propulsion_export.pipeline.merge import merge

    @cache
    def plain(kind):
        directory = tmp_path_factory.mktemp("plain") / kind
        merge(make_world(kind).one, directory)
        return directory

    def make(kind, **settings):
        return _with_settings(plain(kind), tmp_path_factory.mktemp("settings") / kind, settings)

    return make


def _with_settings(source, directory, settings):
    shutil.copytree(source, directory)
    file = directory / "generation_config.json"
    special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    start = json.loads(file.read_text()).get("decoder_start_token_id")
    special |= {} if start is None else {"decoder_start_token_id": start}
    file.write_text(json.dumps(special | settings))
    Artifact.write(directory, Artifact.read(source).manifest)
    return directory


def _of_transformers(directory, texts=TEXTS, **options):
    """What generate() gives for each text alone, and for all of them padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    encoder_decoder = "text2text" in Artifact.read(directory).manifest.task
    kind = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    model = kind.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.padding_side = "right" if encoder_decoder else "left"

    def generate(batch):
        inputs = tokenizer(batch, return_tensors="pt", padding=True)
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            found = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **options)
        read = 1 if encoder_decoder else inputs["input_ids"].shape[1]
        return [_before_end(row[read:].tolist()) for row in found]

    return [generate([text])[0] for text in texts], generate(list(texts))


def _before_end(tokens):
    return tokens[: tokens.index(3)] if 3 in tokens else tokens


def _code(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def _found(directory, **options):
    return [
        item["tokens"] for item in predict(directory, text=TEXTS, max_new_tokens=NEW, **options)
    ]


# Each rule is transformers' own


RULES = {
    "sequence_bias": [[[7], 3.0], [[5, 6], 9.5], [[5, 5, 9], -2.5]],
    "encoder_repetition_penalty": 1.7,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 3,
    "bad_words_ids": [[8], [5, 6], [3]],
    "min_length": 9,
    "min_new_tokens": 5,
    "forced_bos_token_id": 11,
    "forced_eos_token_id": [3, 4],
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [2, 1.4],
    "suppress_tokens": [1, 12, 48],
    "begin_suppress_tokens": [13, 14],
}


def _processors(settings, prompt, read, room):
    """The processors that generate() makes of the settings, and in its order."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WIDTH, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    generation = GenerationConfig(**settings, max_length=read + room)
    generation._eos_token_tensor = torch.tensor([3, 4])
    return LlamaForCausalLM(config)._get_logits_processor(
        generation, input_ids_seq_length=read, encoder_input_ids=torch.tensor([prompt])
    )


def _changed(settings, tokens, scores, prompt, read, room, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    row = Row(np.array(prompt), read, room, (3, 4))
    rules = rules_of(GenerationSettings.read(tmp_path), row)
    return apply_rules(rules, np.array(tokens), scores)


@pytest.mark.parametrize("names", [*((name,) for name in RULES), tuple(RULES)], ids="+".join)
def test_each_rule_is_the_processor_of_transformers(names, tmp_path):
    import torch

    chooser = np.random.default_rng(len(names[0]))
    settings = {name: RULES[name] for name in names}
    differing = 0
    for read in (1, 6):
        # Few different tokens, so that sequences come again.
        prompt = chooser.integers(5, 8, 6).tolist()
        start = prompt[:read]
        for more in range(9):
            tokens = [*start, *chooser.integers(5, 8, more).tolist()]
            scores = chooser.normal(0, 3, WIDTH).astype(np.float32)
            scores[[20, 21]] = np.inf, -np.inf
            theirs = _processors(settings, prompt, read, 9)(
                torch.tensor([tokens]), torch.from_numpy(scores.copy())[None]
            )[0].numpy()

            ours = _changed(settings, tokens, scores.copy(), prompt, read, 9, tmp_path)

            np.testing.assert_array_equal(ours, theirs)
            differing += not np.array_equal(ours, scores)
    assert differing  # the rule did something


def test_every_setting_that_transformers_turns_into_a_processor_is_known():
    from transformers import GenerationConfig

    known = set(APPLIED) | {"guidance_scale", "watermarking_config"}
    assert set(RULES) == set(APPLIED)
    assert not [name for name in known if not hasattr(GenerationConfig(), name)]


# End to end


SETTINGS = {
    "bart": {"forced_bos_token_id": 7, "forced_eos_token_id": 3, "no_repeat_ngram_size": 2},
    "t5": {"repetition_penalty": 1.8, "min_length": 6, "suppress_tokens": [50, 60]},
    "gpt2": {"no_repeat_ngram_size": 3, "repetition_penalty": 1.4, "forced_eos_token_id": 3},
    "llama": {"bad_words_ids": [[30], [20, 21]], "begin_suppress_tokens": list(range(40, 99))},
}


# As Marian's: no padding, a last token, and a beginning that is no end.
MARIAN = {"bad_words_ids": [[0], [58]], "forced_eos_token_id": 3, "decoder_start_token_id": 0}


@pytest.mark.parametrize(("kind", "settings"), [*SETTINGS.items(), ("bart", MARIAN)])
def test_greedy_tokens_are_those_of_transformers(merged, kind, settings):
    directory = merged(kind, **settings)
    alone, padded = _of_transformers(directory)

    assert _found(directory) == alone == padded
    # The twin: without the settings the tokens are others, and transformers' as well.
    bare = merged(kind)
    assert _found(bare) == _of_transformers(bare)[0] != alone


def test_settings_that_count_tokens_do_not_count_padding(merged):
    # transformers counts the padding of a batch towards min_length; a row alone has none.
    directory = merged("gpt2", min_length=14, encoder_no_repeat_ngram_size=1, eos_token_id=[3, 9])
    alone, _ = _of_transformers(directory)

    assert _found(directory) == alone


def test_a_graph_follows_them_too(exported, merged, tmp_path):
    graph = exported("llama", "folded")
    directory = _with_settings(graph, tmp_path / "onnx", SETTINGS["llama"])

    found = _found(directory)

    assert found == _of_transformers(merged("llama", **SETTINGS["llama"]))[0]
    assert found != _found(graph)


def test_sampling_follows_them(merged):
    allowed = {10, 11, 12}
    directory = merged("llama", suppress_tokens=[n for n in range(100) if n not in allowed])

    found = _found(directory, temperature=2.0, seed=1)

    assert {token for tokens in found for token in tokens} == allowed


def test_the_decoder_begins_with_the_token_of_the_generation_settings(merged):
    directory = merged("bart", decoder_start_token_id=9)

    assert first_decoder_token(directory) == 9
    assert _found(directory) == _of_transformers(directory)[0] != _found(merged("bart"))


# What is not applied is named


def test_run_names_what_it_does_not_apply(merged, capsys):
    directory = merged("gpt2", num_beams=4, penalty_alpha=0.6, repetition_penalty=1.2)

    code = _code(["run", str(directory), "--text", TEXTS[0], "--max-new-tokens", "2"])

    told = capsys.readouterr().err
    assert code == 0
    assert told.count("not applied: num_beams 4, penalty_alpha 0.6") == 1
    assert "repetition_penalty" not in told
    assert Session(directory).settings_not_applied == {"num_beams": 4, "penalty_alpha": 0.6}


def test_sampling_of_the_file_is_named_unless_the_caller_samples(merged):
    directory = merged("gpt2", do_sample=True, temperature=0.6, top_p=0.9)
    notes = []

    _found(directory, on_note=notes.append)
    _found(directory, on_note=notes.append, temperature=1.0, seed=0)

    assert [note.partition("not applied: ")[2] for note in notes] == [
        "do_sample True, temperature 0.6, top_p 0.9"
    ]
    # The twin: a session samples when it is told to.
    drawn = Settings(new_tokens=NEW, sampling=Sampling(temperature=3.0), seed=0)
    sampled = Session(directory)(list(TEXTS), settings=drawn)
    assert [reply.prediction["tokens"] for reply in sampled] != _found(directory)


def test_a_model_without_such_settings_has_nothing_to_say(merged, capsys):
    assert _code(["run", str(merged("gpt2")), "--text", TEXTS[0], "--max-new-tokens", "2"]) == 0
    assert "not applied" not in capsys.readouterr().err


def test_inspect_says_which_settings_are_applied(merged, capsys):
    directory = merged("gpt2", repetition_penalty=1.2, num_beams=3, no_repeat_ngram_size=0)

    assert _code(["inspect", str(directory), "--json"]) == 0

    told = json.loads(capsys.readouterr().out)["generation"]
    assert told == {"applied": {"repetition_penalty": 1.2}, "not_applied": {"num_beams": 3}}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", "high"),
        ("repetition_penalty", -1.0),
        ("suppress_tokens", [1.5]),
        ("bad_words_ids", [3]),
        ("forced_bos_token_id", 1000),
        ("exponential_decay_length_penalty", 3),
        ("sequence_bias", {"7": 1.0}),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_name(merged, name, value):
    directory = merged("bart", **{name: value})

    with pytest.raises(ArtifactError, match=rf"generation_config.json: {name} is .*, expected "):
        _found(directory)


def test_settings_of_other_searches_do_not_stand_in_the_way_of_an_export(make_world, tmp_path):
    from propulsion_export.pipeline.onnx import export_onnx

    settings = {"stop_strings": ["ba"], "penalty_alpha": 0.6, "top_k": 4}
    world = make_world("llama")
    base = shutil.copytree(world.base, tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 3} | settings))

    export_onnx([world.one], tmp_path / "onnx", model=str(base))

    kept = json.loads((tmp_path / "onnx" / "generation_config.json").read_text())
    assert kept.items() >= settings.items()


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.8, "suppress_tokens": [97]},
        {"no_repeat_ngram_size": 1},
        {"min_length": 12, "eos_token_id": [72]},
    ],
)
def test_a_package_for_genai_carries_what_its_runtime_applies(exported, tmp_path, settings):
    og = pytest.importorskip("onnxruntime_genai")
    from propulsion_export.pipeline.package import package

    directory = _with_settings(exported("llama", "folded"), tmp_path / "onnx", settings)
    package(directory, tmp_path / "served", layout="genai")

    content = json.loads((tmp_path / "served" / "genai_config.json").read_text())["search"]
    [text] = predict(directory, text=["ba ba ke"], max_new_tokens=NEW)
    prompt = read_serving_tokenizer(directory)("ba ba ke")["input_ids"]
    found = _by_genai(og, tmp_path / "served", list(prompt))
    assert found == text["tokens"]
    kept = set(settings) - {"eos_token_id", "suppress_tokens"}
    assert {name: content.get(name) for name in kept} == {name: settings[name] for name in kept}
    assert "suppress_tokens" not in content  # the runtime has no such setting


def _by_genai(og, directory, prompt):
    model = og.Model(str(directory))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + NEW)
    generator = og.Generator(model, params)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    tokens = [int(token) for token in generator.get_sequence(0)][len(prompt) :]
    return tokens[:-1] if tokens[-1] in (3, 72) else tokens  # the end
