"""The oracle computes what every row alone computes, however it saves time and memory."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import KINDS

from kinds import DECODERS, EXPERTS, GENERATIVE
from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.tensor_names import LOGITS
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.errors import UnavailableError, UsageError
from propulsion_export.graph.sample_inputs import input_names
from propulsion_export.parity.by_layer import compute_by_layer, emptied, stack_of
from propulsion_export.parity.devices import check_device, choose_compute
from propulsion_export.parity.forwards import compute_whole, precision
from propulsion_export.parity.generation import continue_greedily, padded_inside
from propulsion_export.parity.inputs import decoder_inputs, parity_inputs, with_decoder_tokens
from propulsion_export.parity.oracle import compute_oracle
from propulsion_export.runners.decoding import recomputing, replaying, row_by_row
from propulsion_export.runners.pytorch import torch_candidate
from propulsion_export.scaling.attach import attached

STEPS = 24
FAMILIES = {"t5": "text2text-generation", "bart": "text2text-generation"}


def base_of(model, task="text-generation"):
    return BaseModel(model, "tiny", task, frozenset(), frozenset(), ())


def artifact(mode="folded", dtype="float32"):
    """Of an artifact, only what the oracle reads."""
    manifest = SimpleNamespace(mode=mode, dtype=dtype, kind="onnx", layout={})
    return SimpleNamespace(manifest=manifest, feeds=lambda name: {})


def oracle(base, adapters, batches, **options):
    mode = options.pop("mode", "folded")
    made = artifact(mode, options.pop("dtype", "float32"))
    return compute_oracle(
        made, base, adapters, batches, lambda *_: None, **{"steps": STEPS, **options}
    )


def decoder(kind, tiny_model):
    base = base_of(tiny_model(kind), FAMILIES.get(kind, "text-generation"))
    config = base.model.config
    if kind in FAMILIES:
        names = ("input_ids", "attention_mask")
        return base, with_decoder_tokens(parity_inputs(names, config, seed=0), config, seed=0)
    return base, decoder_inputs(config, seed=0)


def alone_in_float64(base, adapter, batches):
    """The same by the plainest way: every row by itself, tokens one by one."""
    base.model.double()
    with precision(torch.float64), attached(base.model, adapter):
        model = torch_candidate(base.model, base.task)
        outputs = [row_by_row(recomputing(model))(batch)[LOGITS] for batch in batches]
        real = batches[0]["attention_mask"] == 1
        prompts = zip(batches[0]["input_ids"], real, (5, 12, 9), strict=False)
        rows = [tokens[seen][:length] for tokens, seen, length in prompts]
        going = [continue_greedily(model, model.pad([row], 0), STEPS) for row in rows]
    return outputs, *(np.concatenate(parts) for parts in zip(*going, strict=True))


def same(found, expected, share=1e-12):
    return np.abs(found - expected).max() <= share * np.abs(expected).max()


@pytest.mark.parametrize("kind", GENERATIVE)
def test_truth_is_that_of_every_row_alone(kind, tiny_model, random_adapter):
    base, batches = decoder(kind, tiny_model)
    if kind in EXPERTS:
        base.model.set_experts_implementation("eager")
    adapter = random_adapter(base.model)
    expected, tokens, margins = alone_in_float64(base, adapter, batches)

    (found,) = oracle(base, [adapter], batches)

    assert all(same(f[LOGITS], e) for f, e in zip(found.oracle, expected, strict=True))
    assert np.array_equal(found.continuation.tokens, tokens)
    assert same(found.continuation.margins, margins, 1e-9)


@pytest.mark.parametrize("kind", ["llama", "mistral", "bloom"])
def test_logits_padded_inside_are_those_of_several_steps(kind, tiny_model, random_adapter):
    """They are computed in one step, as a cache changes nothing in float64."""
    base, batches = decoder(kind, tiny_model)
    adapter = random_adapter(base.model)

    (found,) = oracle(base, [adapter], batches)

    base.model.double()
    padded = padded_inside(batches[0])
    with precision(torch.float64), attached(base.model, adapter):
        expected = replaying(torch_candidate(base.model, base.task))(padded)[LOGITS]
    real = padded["attention_mask"] == 1
    if not np.isfinite(expected[real]).all():
        assert found.inside is None
    else:
        assert same(found.inside[real], expected[real])


def spying(compute):
    """`compute`, and what it has been asked for: passes, rows, and dtypes."""
    seen = []

    def spy(base, works, dtype):
        seen.append((dtype, [(work.adapter, len(work.items)) for work in works]))
        return compute(base, works, dtype)

    return spy, seen


def test_rows_of_a_model_whose_padding_leaks_run_alone(tiny_model, random_adapter):
    base, batches = decoder("llama", tiny_model)
    adapter = random_adapter(base.model)

    def leak(module, arguments, output):
        return output + 0.1 * output.mean(1, keepdim=True)

    base.model.model.layers[0].register_forward_hook(leak)
    expected, _, _ = alone_in_float64(base, adapter, batches)
    spy, seen = spying(compute_whole("cpu"))

    (found,) = oracle(base, [adapter], batches, compute=spy, draft=fixed_draft(7))

    assert all(same(f[LOGITS], e) for f, e in zip(found.oracle, expected, strict=True))
    together, alone = (sum(count for _, count in works) for _, works in seen[:2])
    assert together < alone
    assert alone >= 2 * 16


def test_rows_of_a_right_model_run_together(tiny_model, random_adapter):
    base, batches = decoder("llama", tiny_model)
    spy, seen = spying(compute_whole("cpu"))

    oracle(base, [random_adapter(base.model)], batches, compute=spy, draft=fixed_draft(7))

    assert [dtype for dtype, _ in seen] == [torch.float64, torch.float32]
    assert all(count < 16 for _, works in seen for _, count in works)


def test_what_two_adapters_have_in_common_is_computed_once(tiny_model, random_adapter):
    """Without scales each of them is the base model."""
    base, batches = decoder("llama", tiny_model)
    adapters = [random_adapter(base.model, seed, f"adapter-{seed}") for seed in (1, 2)]
    spy, seen = spying(compute_whole("cpu"))

    first, second, plain = oracle(
        base, adapters, batches, mode="switchable", compute=spy, draft=fixed_draft(7)
    )

    in_float64 = [adapter.name for adapter, _ in seen[0][1]]
    assert sorted(in_float64[1:]) == ["adapter-1", "adapter-2"]
    assert len(in_float64) == 3
    assert first.unscaled is second.unscaled is plain.oracle
    assert not same(first.oracle[0][LOGITS], plain.oracle[0][LOGITS])


def test_adapters_with_heads_share_no_more_than_they_have_in_common(tiny_model, random_adapter):
    base = base_of(tiny_model("bert"), "text-classification")
    adapters = [random_adapter(base.model, seed, f"head-{seed}", head=True) for seed in (1, 2)]
    batches = parity_inputs(
        input_names(type(base.model), base.model.config), base.model.config, seed=0
    )

    first, second = oracle(base, adapters, batches)

    for adapter, subject in zip(adapters, (first, second), strict=True):
        base.model.double()
        for attach, found in (
            (adapter, subject.oracle),
            (replace(adapter, scales={}), subject.unscaled),
        ):
            with attached(base.model, attach), torch.inference_mode():
                feeds = {name: torch.from_numpy(v) for name, v in batches[0].items()}
                expected = base.model(**feeds).logits.numpy()
            assert same(found[0][LOGITS], expected)


def counting(model, path):
    """How often a module runs."""
    calls = []
    model.get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_layers_before_the_first_scale_run_once(tiny_model, random_adapter):
    base, batches = decoder("llama", tiny_model)
    late = random_adapter(base.model, only="layers.1.")
    calls = [counting(base.model, f"model.layers.{n}.self_attn") for n in (0, 1)]
    expected, _, _ = alone_in_float64(base, late, batches)
    for each in calls:
        each.clear()

    adapted, _ = oracle(base, [late], batches, mode="switchable", draft=fixed_draft(7))

    assert all(same(f[LOGITS], e) for f, e in zip(adapted.oracle, expected, strict=True))
    # Of the passes in float64, all but the continuation are those of the base model.
    assert len(calls[1]) - len(calls[0]) >= 5


@pytest.mark.parametrize("kind", ["albert", "t5"])
def test_model_that_is_no_stack_of_layers_shares_none(kind, tiny_model):
    with pytest.raises(UsageError, match="not one stack of layers"):
        stack_of(tiny_model(kind))


def test_layer_that_reads_an_earlier_one_is_not_shared(tiny_model, random_adapter):
    """A model with a connection past a layer: from an earlier run, it would read nothing right."""
    base, batches = decoder("llama", lambda kind: tiny_model(kind, num_hidden_layers=3))
    kept = []
    layers = base.model.model.layers
    layers[0].register_forward_hook(lambda module, arguments, output: kept.append(output))
    layers[2].register_forward_pre_hook(
        lambda module, arguments: (arguments[0] + kept[-1], *arguments[1:])
    )
    late = random_adapter(base.model, only="layers.2.")
    expected, _, _ = alone_in_float64(base, late, batches)

    adapted, _ = oracle(base, [late], batches, mode="switchable", draft=fixed_draft(7))

    assert all(same(f[LOGITS], e) for f, e in zip(adapted.oracle, expected, strict=True))


def fixed_draft(token):
    """A candidate that generates one token over and over."""
    return lambda prompt, steps: (
        np.full((len(prompt["input_ids"]), steps), token),
        np.ones((len(prompt["input_ids"]), steps)),
    )


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("place", [0, 1, STEPS - 1])
def test_draft_that_parts_is_known_by_the_step_and_margin(place, kind, tiny_model, random_adapter):
    base, batches = decoder(kind, tiny_model)
    adapter = random_adapter(base.model)
    _, tokens, margins = alone_in_float64(base, adapter, batches)
    wrong = tokens.copy()
    wrong[1, place:] = (wrong[1, place:] + 1) % 100

    (found,) = oracle(base, [adapter], batches, draft=lambda prompt, steps: (wrong, margins))

    going = found.continuation
    assert np.array_equal(going.candidate[0], wrong)
    assert np.array_equal(going.tokens[[0, 2]], tokens[[0, 2]])
    assert np.array_equal(going.tokens[1, : place + 1], tokens[1, : place + 1])
    assert same(going.margins[1, : place + 1], margins[1, : place + 1], 1e-9)
    assert np.argmax(going.tokens[1] != wrong[1]) == place


def test_draft_of_tokens_that_do_not_exist_parts_too(tiny_model, random_adapter):
    base, batches = decoder("llama", tiny_model)

    (found,) = oracle(base, [random_adapter(base.model)], batches, draft=fixed_draft(10**6))

    assert (found.continuation.candidate[0] == 10**6).all()
    assert (found.continuation.tokens < 100).all()


def by_both(base, adapters, batches, **options):
    """The subjects by the whole model and layer by layer."""
    options |= {"draft": fixed_draft(7)} if base.task == "text-generation" else {}
    by_layer = oracle(base, adapters, batches, compute=compute_by_layer("cpu"), **options)
    whole = oracle(base, adapters, batches, compute=compute_whole("cpu"), **options)
    return zip(whole, by_layer, strict=True)


def assert_same(whole, layered):
    for part in ("oracle", "reference", "unscaled"):
        pairs = zip(getattr(whole, part) or (), getattr(layered, part) or (), strict=True)
        for expected, found in pairs:
            assert expected.keys() == found.keys()
            for name, values in expected.items():
                assert values.dtype == found[name].dtype
                assert np.array_equal(values, found[name], equal_nan=True), (part, name)
    if whole.continuation is not None:
        for part in ("tokens", "margins", "reference"):
            ours, theirs = (getattr(s.continuation, part) for s in (whole, layered))
            assert np.array_equal(ours, theirs), part
    assert (whole.inside is None) == (layered.inside is None)
    assert whole.inside is None or np.array_equal(whole.inside, layered.inside, equal_nan=True)


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, "float32") for kind in DECODERS), ("llama", "bfloat16")]
)
def test_decoder_layer_by_layer_gives_the_same_numbers(dtype, kind, tiny_model, random_adapter):
    base, batches = decoder(kind, lambda kind: tiny_model(kind, **three_layers(kind)))
    adapters = [
        random_adapter(base.model, 1, "all", biases=True, head=True),
        random_adapter(base.model, 2, "late", only="2."),
    ]

    for whole, layered in by_both(base, adapters, batches, mode="switchable", dtype=dtype):
        assert_same(whole, layered)


def three_layers(kind):
    if kind == "gemma3":
        return {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
    return {"n_layer" if kind in ("gpt2", "gptj", "bloom") else "num_hidden_layers": 3}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("albert", "distilbert")])
def test_encoder_layer_by_layer_gives_the_same_numbers(kind, tiny_model, random_adapter):
    base = base_of(tiny_model(kind), "text-classification")
    config = base.model.config
    batches = parity_inputs(input_names(type(base.model), config), config, seed=0)
    adapters = [random_adapter(base.model, 1, "tuned", biases=True, head=True)]

    for whole, layered in by_both(base, adapters, batches):
        assert_same(whole, layered)


def test_layer_by_layer_leaves_the_model_as_it_was(tiny_model, random_adapter):
    base, batches = decoder("llama", tiny_model)
    before = dict(base.model.state_dict(keep_vars=True))

    oracle(
        base, [random_adapter(base.model)], batches,
        compute=compute_by_layer("cpu"), draft=fixed_draft(7),
    )  # fmt: skip

    after = base.model.state_dict(keep_vars=True)
    assert all(after[name] is value for name, value in before.items())
    assert not any("forward" in layer.__dict__ for layer in base.model.model.layers)


def filled(model):
    """The layers whose weights are numbers in memory, not one zero for all."""
    return [
        place
        for place, layer in enumerate(stack_of(model).layers)
        if all(p.untyped_storage().nbytes() > p.element_size() for p in layer.parameters())
    ]


def test_one_layer_is_filled_at_a_time(tiny_model, random_adapter):
    base, batches = decoder("llama", lambda kind: tiny_model(kind, num_hidden_layers=5))
    seen = []
    for place, layer in enumerate(base.model.model.layers):
        layer.self_attn.register_forward_hook(
            lambda *_, place=place: seen.append((place, filled(base.model)))
        )

    oracle(
        base, [random_adapter(base.model)], batches,
        compute=compute_by_layer("cpu"), draft=fixed_draft(7),
    )  # fmt: skip

    assert all(now == [place] for place, now in seen)
    order = [place for place, _ in seen]
    # All passes of all states go through a layer before the next; once in each precision.
    assert [order[n] for n in range(len(order)) if not n or order[n] != order[n - 1]] == [
        *range(5), *range(5)
    ]  # fmt: skip


def test_embeddings_are_filled_for_the_first_and_last_layer_only(tiny_model):
    model = tiny_model("llama")

    with emptied(model, "cpu", torch.float64) as fill:
        assert model.lm_head.weight.untyped_storage().nbytes() == 8
        assert model.model.embed_tokens.weight.untyped_storage().nbytes() == 8
        assert model.model.norm.weight.dtype == torch.float64
        with fill([model.lm_head]):
            assert model.lm_head.weight.untyped_storage().nbytes() == 8 * 100 * 32
        assert model.lm_head.weight.untyped_storage().nbytes() == 8


def test_layer_that_reads_an_earlier_one_is_seen_layer_by_layer(tiny_model, random_adapter):
    """It cannot be right, so it is not a number and no candidate agrees with it."""
    base, batches = decoder("llama", lambda kind: tiny_model(kind, num_hidden_layers=4))
    kept = []
    layers = base.model.model.layers
    layers[0].register_forward_hook(lambda module, arguments, output: kept.append(output))
    layers[3].register_forward_pre_hook(
        lambda module, arguments: (arguments[0] + kept[-1], *arguments[1:])
    )

    with pytest.raises(UsageError, match="read nothing of each other"):
        oracle(
            base, [random_adapter(base.model)], batches,
            compute=compute_by_layer("cpu"), draft=fixed_draft(7),
        )  # fmt: skip


def test_gpu_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(UnavailableError, match="--device cuda: "):
        check_device("cuda")
    check_device("cpu")
    check_device("auto")


@pytest.mark.parametrize(("free", "expected"), [(10**12, "cuda"), (10**3, "cpu")])
def test_a_gpu_is_taken_by_itself_if_it_has_room(free, expected, monkeypatch, tiny_model):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 10**12))
    monkeypatch.setattr(
        "propulsion_export.parity.devices.compute_whole", lambda device: taken.append(device)
    )

    choose_compute(base_of(tiny_model("llama")), "auto", low_memory=False)

    assert taken == [expected]


def test_model_that_is_no_stack_is_refused_before_anything_is_computed(tiny_model):
    base = base_of(tiny_model("t5"), "text2text-generation")

    with pytest.raises(UsageError, match="--low-memory: T5ForConditionalGeneration"):
        choose_compute(base, "cpu", low_memory=True)


def test_identity_and_no_adapter_are_the_same_state(tiny_model):
    from propulsion_export.adapters.scales import Scale
    from propulsion_export.parity.states import effect_of

    ones = Adapter("ones", {"a": Scale(np.ones(3))})
    twos = Adapter("twos", {"a": Scale(np.full(3, 2.0))})
    inputs = Adapter("inputs", {"a": Scale(np.full(3, 2.0), "input")})
    biased = Adapter("biased", {}, biases={"a": np.ones(3)})

    assert effect_of(ones) == effect_of(Adapter("base", {}))
    assert len({effect_of(each) for each in (ones, twos, inputs, biased)}) == 4


def passes(seen, dtype):
    """How many passes were asked for in a dtype."""
    return sum(count for kind, works in seen if kind == dtype for _, count in works)


def test_rows_padded_inside_are_computed_only_for_a_graph_that_reads_them(
    tiny_model, random_adapter
):
    found = {}
    for gaps in (True, False):
        base, batches = decoder("llama", tiny_model)
        spy, seen = spying(compute_whole("cpu"))
        options = {"compute": spy, "draft": fixed_draft(7), "gaps": gaps}
        (subject,) = oracle(base, [random_adapter(base.model)], batches, **options)
        found[gaps] = passes(seen, torch.float64), subject

    assert found[True][0] == found[False][0] + 1
    assert found[True][1].inside is not None
    assert found[False][1].inside is None
    assert_same(replace(found[True][1], inside=None), found[False][1])


def test_pytorchs_own_choices_are_asked_for_only_where_the_draft_parts(tiny_model, random_adapter):
    base, batches = decoder("llama", tiny_model)
    adapter = random_adapter(base.model)
    _, tokens, margins = alone_in_float64(base, adapter, batches)
    wrong = tokens.copy()
    wrong[2, 5] = (wrong[2, 5] + 1) % 100

    counts, references = [], []
    for draft in (tokens, wrong):
        spy, seen = spying(compute_whole("cpu"))
        (subject,) = oracle(
            base, [adapter], batches, compute=spy, draft=lambda *_, d=draft: (d, margins)
        )
        counts.append(passes(seen, torch.float32))
        references.append(subject.continuation.reference)

    assert counts[1] == counts[0] + 1
    assert references[0] is None
    assert references[1].shape == tokens.shape
