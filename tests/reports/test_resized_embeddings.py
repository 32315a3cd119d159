"""Rows that training added to the embeddings, with their tokens, must be in what is exported."""

import json
import shutil
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.changing import add_adapter
from propulsion_export.base_model.tokenizer.reading import read_tokenizer
from propulsion_export.errors import AdapterError
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx

peft = pytest.importorskip("peft", reason="PEFT writes the adapters")
torch = pytest.importorskip("torch", reason="a model is made")
transformers = pytest.importorskip("transformers", reason="a model is made")

TOKENS = ["<one>", "<two>", "<three>"]
TEXT = "ba <two> ko"


def trained(base, directory, config, *, resize=True, tokenizer=True):
    """An adapter as PEFT writes it, and the model with it; vectors and saved modules are random."""
    task = config.task_type
    auto = "AutoModelForCausalLM" if task == "CAUSAL_LM" else "AutoModelForSequenceClassification"
    model = getattr(transformers, auto).from_pretrained(base)
    words = transformers.AutoTokenizer.from_pretrained(base)
    if resize:
        words.add_tokens([transformers.AddedToken(token, special=True) for token in TOKENS])
        model.resize_token_embeddings(len(words), mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config)
        chosen = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                resized = resize and ("word_embeddings" in name or "embed_tokens" in name)
                if parameter.requires_grad or resized:
                    noise = torch.randn(parameter.shape, generator=chosen)
                    parameter.add_(0.3 * noise.abs())
        wrapped.save_pretrained(directory)
    if tokenizer:
        words.save_pretrained(directory)
    return wrapped.eval(), words


def ia3(**settings):
    targets = settings.pop("target_modules", ["k_proj", "v_proj"])
    return peft.IA3Config(target_modules=targets, feedforward_modules=[], **settings)


def propulsion(**settings):
    from propulsion_export.tuning import PropulsionConfig

    targets = settings.pop("target_modules", ["k_proj", "v_proj"])
    return PropulsionConfig(target_modules=targets, degree=3, **settings)


SAVED = {"modules_to_save": ["embed_tokens", "lm_head"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def llama(tiny_model, tiny_checkpoint, tmp_path_factory):
    """A Llama whose embeddings are not tied, with the tiny tokenizer."""
    base = tmp_path_factory.mktemp("llama") / "base"
    shutil.copytree(tiny_checkpoint("llama"), base)
    tiny_model("llama", tie_word_embeddings=False).save_pretrained(base)
    return base


@pytest.mark.parametrize("make", [ia3, propulsion])
@pytest.mark.parametrize("settings", [SAVED, {"task_type": "CAUSAL_LM"}], ids=["trained", "frozen"])
def test_merged_checkpoint_has_the_added_rows_and_tokens(make, settings, llama, tmp_path):
    model, words = trained(llama, tmp_path / "tuned", make(**settings))
    inputs = words(TEXT, return_tensors="pt")

    merge(tmp_path / "tuned", tmp_path / "merged", model=str(llama))

    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == merged.get_input_embeddings().num_embeddings == 103
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")(TEXT)[
        "input_ids"
    ] == list(inputs["input_ids"][0])
    with torch.no_grad():
        expected, found = model(**inputs).logits, merged(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_wrapped_names_are_read_as_the_parameters_they_replace(llama, tmp_path):
    trained(llama, tmp_path / "tuned", ia3(**SAVED))
    stored = load_file(tmp_path / "tuned" / "adapter_model.safetensors")

    read = Adapter.read(tmp_path / "tuned")

    assert any("original_module" in key for key in stored)
    assert read.modules.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    np.testing.assert_array_equal(
        read.modules["lm_head.weight"],
        stored["base_model.model.lm_head.modules_to_save.weight"],
    )


def test_copies_of_a_trained_module_that_differ_are_refused(llama, tmp_path):
    trained(llama, tmp_path / "tuned", ia3(**SAVED))
    file = tmp_path / "tuned" / "adapter_model.safetensors"
    stored = load_file(file)
    save_file(stored | {"base_model.model.lm_head.weight": stored["base_model.model.lm_head.weight"]
                        * 2}, file)  # fmt: skip

    with pytest.raises(AdapterError, match=r"lm_head\.weight differs from its copy"):
        Adapter.read(tmp_path / "tuned")


def test_folded_graph_of_a_classifier_reads_the_added_tokens(tiny_checkpoint, tmp_path):
    from propulsion_export.pipeline.parity import check_parity
    from propulsion_export.serving.session import Session

    base = tiny_checkpoint()
    config = ia3(target_modules=["query", "value"], task_type="SEQ_CLS")
    model, words = trained(base, tmp_path / "tuned", config)
    config_file = tmp_path / "tuned" / "adapter_config.json"
    settings = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))

    export_onnx([tmp_path / "tuned"], tmp_path / "onnx")

    (reply,) = Session(tmp_path / "onnx")([TEXT])
    with torch.no_grad():
        expected = model(**words(TEXT, return_tensors="pt")).logits[0]
    np.testing.assert_allclose(reply.outputs["logits"], expected.numpy(), atol=1e-5)
    assert read_tokenizer(tmp_path / "onnx")(TEXT)["input_ids"] == words(TEXT)["input_ids"]
    assert check_parity(tmp_path / "onnx").passed


@pytest.mark.parametrize("mode", ["switchable", "bank"])
def test_choosing_at_run_time_is_refused(mode, tiny_checkpoint, tmp_path):
    trained(
        tiny_checkpoint(),
        tmp_path / "tuned",
        ia3(target_modules=["query", "value"], task_type="SEQ_CLS"),
        tokenizer=False,
    )

    with pytest.raises(AdapterError, match="resized to 103 rows"):
        export_onnx(
            [tmp_path / "tuned"], tmp_path / "onnx", model=str(tiny_checkpoint()), mode=mode
        )

    assert not (tmp_path / "onnx").exists()


def test_adapter_that_brings_only_some_of_the_resized_tensors_is_refused(llama, tmp_path):
    trained(llama, tmp_path / "tuned", ia3(**SAVED))
    file = tmp_path / "tuned" / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "lm_head" not in key}, file)

    with pytest.raises(AdapterError, match=r"resized from 100 to 103 rows, expected .*lm_head"):
        merge(tmp_path / "tuned", tmp_path / "merged", model=str(llama))


def test_scaled_and_resized_embedding_is_refused(llama, tmp_path):
    config = propulsion(target_modules=["k_proj", "embed_tokens"], task_type="CAUSAL_LM")
    trained(llama, tmp_path / "tuned", config)

    with pytest.raises(AdapterError, match="resized from 100 to 103 rows"):
        merge(tmp_path / "tuned", tmp_path / "merged", model=str(llama))


def test_tokens_beyond_the_embeddings_of_an_adapter_are_named(llama, tmp_path):
    _, words = trained(llama, tmp_path / "tuned", ia3(**SAVED))
    words.add_tokens(["<late>"])
    words.save_pretrained(tmp_path / "tuned")

    with pytest.raises(AdapterError, match=r"'<late>' \(103\)"):
        merge(tmp_path / "tuned", tmp_path / "merged", model=str(llama))


def test_saved_embeddings_of_the_bases_size_stay_right(llama, tmp_path):
    model, words = trained(llama, tmp_path / "tuned", ia3(**SAVED), resize=False)
    inputs = words("ba ko", return_tensors="pt")

    merge(tmp_path / "tuned", tmp_path / "merged", model=str(llama))

    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, model(**inputs).logits)


@pytest.fixture
def with_tokenizer(world, tmp_path):
    """`with_tokenizer(adapter, tokens)`: a copy of it beside a tokenizer with these tokens more."""

    def make(adapter, tokens):
        directory = tmp_path / adapter.name
        shutil.copytree(adapter, directory)
        words = transformers.AutoTokenizer.from_pretrained(world.base)
        words.add_tokens(tokens)
        words.save_pretrained(directory)
        return directory

    return make


def test_adapter_with_another_tokenizer_is_not_added(switchable, world, with_tokenizer, tmp_path):
    shutil.copytree(switchable, tmp_path / "artifact")
    other, same = with_tokenizer(world.three, ["<new>"]), with_tokenizer(world.five, [])

    with pytest.raises(AdapterError, match=r"own tokenizer differs.*'<new>' \(100\)"):
        add_adapter(tmp_path / "artifact", other, force=True)
    add_adapter(tmp_path / "artifact", f"more={same}")


def test_adapters_with_different_tokenizers_are_not_exported_together(
    world, with_tokenizer, tmp_path
):
    other = with_tokenizer(world.three, ["<new>"])

    with pytest.raises(AdapterError, match=r"three and five: .*'<new>' \(100\)"):
        export_onnx([other, world.five], tmp_path / "onnx", mode="switchable")
