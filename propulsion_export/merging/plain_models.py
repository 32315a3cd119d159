"""Language models whose parameters are known from config.json alone, without building the model.

A test builds a small model of each type, and compares what is known here with what transformers'
class has: names, shapes, and by which rule each parameter is scaled.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.base_model.checkpoint import Checkpoint, Entries
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.merging.quantised.modules import PlainRule
from propulsion_export.scaling.fold.jobs import Job, Part, Rule

Kind = Literal["linear", "embedding", "norm", "norm plus one"]
_PREFIX = "model."
_BEFORE_AND_AFTER = ("input_layernorm", "post_attention_layernorm")
_AROUND_BOTH = (*_BEFORE_AND_AFTER, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Family:
    """What the models of one type have in common.

    Attributes:
        architecture: transformers' class with the language modelling head.
        norms: those of a layer.
        norm: how a norm multiplies.
        head_norms: whether queries and keys have a norm for each head.
        fused: whether queries, keys and values are one matrix, and gate and up are one.
        biased: the linear layers of the attention that always have a bias.
        settings: which of `attention_bias` and `mlp_bias` its configuration knows.
        head_dim: the default; None: hidden size over heads.
        tied: the default of `tie_word_embeddings`.
    """

    architecture: str
    norms: tuple[str, ...] = _BEFORE_AND_AFTER
    norm: Kind = "norm"
    head_norms: bool = False
    fused: bool = False
    biased: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    head_dim: int | None = None
    tied: bool = False


FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", settings=("attention_bias", "mlp_bias")),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", biased=_QKV),
    "qwen3": Family(
        "Qwen3ForCausalLM", head_norms=True, settings=("attention_bias",), head_dim=128
    ),
    "granite": Family("GraniteForCausalLM", settings=("attention_bias", "mlp_bias")),
    "phi3": Family("Phi3ForCausalLM", fused=True),
    "gemma": Family(
        "GemmaForCausalLM",
        norm="norm plus one",
        settings=("attention_bias",),
        head_dim=256,
        tied=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        norms=_AROUND_BOTH,
        norm="norm plus one",
        settings=("attention_bias",),
        head_dim=256,
        tied=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        norms=_AROUND_BOTH,
        norm="norm plus one",
        head_norms=True,
        settings=("attention_bias",),
        head_dim=256,
        tied=True,
    ),
}


@dataclass(frozen=True)
class Module:
    """One module with parameters.

    Attributes:
        path: its path in the model.
        kind: how it is scaled.
        shape: of its weight.
        bias: whether it has one.
    """

    path: str
    kind: Kind
    shape: tuple[int, ...]
    bias: bool = False

    @property
    def outputs(self) -> int:
        """The channels of its output."""
        return self.shape[-1] if self.kind == "embedding" else self.shape[0]

    @property
    def rule(self) -> PlainRule:
        """How a scale of its outputs lies over its weight."""
        match self.kind:
            case "linear":
                return "rows"
            case "embedding":
                return "columns"
        return self.kind

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        bias = {f"{self.path}.bias": (self.outputs,)} if self.bias else {}
        return {f"{self.path}.weight": self.shape} | bias


def plain_jobs(
    settings: Mapping[str, Any], checkpoint: Checkpoint, adapter: Adapter
) -> list[Job] | None:
    """What is to be written, in the model's order, as `scaling.fold.listing` would list it.

    Args:
        settings: the content of config.json.
        checkpoint: the base model's.
        adapter: the adapter to fold in.

    Returns:
        None where that is not known for certain: the type of the model is not in `FAMILIES`, what
        is stored is not what its settings say, or the adapter does not fit or brings modules.
    """
    modules = fitting_modules(settings, adapter)
    if modules is None or not _is_stored(modules, checkpoint):
        return None
    return [
        Job(name, name, Part(name, name, name), _rule(module, name, adapter))
        for module in modules
        for name in module.parameters()
    ]


def fitting_modules(settings: Mapping[str, Any], adapter: Adapter) -> Sequence[Module] | None:
    """The modules of the model that config.json describes.

    Returns:
        None where they are not known, or the adapter does not fit them or brings modules.
    """
    modules = plain_modules(settings)
    if modules is None or adapter.modules or adapter.frozen:
        return None
    return modules if _fits(modules, adapter, _is_tied(settings)) else None


def plain_fingerprint(checkpoint: Checkpoint) -> Fingerprint:
    """The fingerprint of a checkpoint that `plain_jobs` knows."""
    return Fingerprint.of(
        {
            name.removeprefix(_PREFIX): Entries(tensor)
            for name, tensor in checkpoint.tensors.items()
            if name.startswith(_PREFIX)
        }
    )


def plain_modules(settings: Mapping[str, Any]) -> Sequence[Module] | None:
    """The modules of the model that config.json describes; None where that is not known."""
    family = FAMILIES.get(str(settings.get("model_type")))
    if family is None or settings.get("architectures") != [family.architecture]:
        return None
    try:
        return list(_modules(family, settings))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):  # let transformers say what it is
        return None


def _is_tied(settings: Mapping[str, Any]) -> bool:
    family = FAMILIES[str(settings["model_type"])]
    return bool(settings.get("tie_word_embeddings", family.tied))


def _modules(family: Family, settings: Mapping[str, Any]) -> Iterator[Module]:
    hidden, rows = settings["hidden_size"], settings["vocab_size"]
    yield Module(f"{_PREFIX}embed_tokens", "embedding", (rows, hidden))
    for layer in range(settings["num_hidden_layers"]):
        for module in _layer(family, settings):
            path = f"{_PREFIX}layers.{layer}.{module.path}"
            yield Module(path, module.kind, module.shape, module.bias)
    yield Module(f"{_PREFIX}norm", family.norm, (hidden,))
    if not _is_tied(settings):
        yield Module("lm_head", "linear", (rows, hidden))


def _layer(family: Family, settings: Mapping[str, Any]) -> Iterator[Module]:
    hidden, inner = settings["hidden_size"], settings["intermediate_size"]
    for name, shape in _attention(family, settings).items():
        bias = _has(family, settings, "attention_bias") or name in family.biased
        yield Module(f"self_attn.{name}", "linear", shape, bias)
    if family.head_norms:
        for name in ("q_norm", "k_norm"):
            yield Module(f"self_attn.{name}", family.norm, (_head_dim(family, settings),))
    up = {"gate_up_proj": 2 * inner} if family.fused else {"gate_proj": inner, "up_proj": inner}
    bias = _has(family, settings, "mlp_bias")
    for name, width in up.items():
        yield Module(f"mlp.{name}", "linear", (width, hidden), bias)
    yield Module("mlp.down_proj", "linear", (hidden, inner), bias)
    for name in family.norms:
        yield Module(name, family.norm, (hidden,))


def _attention(family: Family, settings: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """The shapes of its linear layers."""
    heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
    size = _head_dim(family, settings)
    queries = heads * size
    keys = (settings.get("num_key_value_heads") or heads) * size
    output = {"o_proj": (hidden, queries)}
    if family.fused:
        return output | {"qkv_proj": (queries + 2 * keys, hidden)}
    return dict(zip(_QKV, [(w, hidden) for w in (queries, keys, keys)], strict=True)) | output


def _head_dim(family: Family, settings: Mapping[str, Any]) -> int:
    own = settings.get("head_dim", family.head_dim)
    return int(own or settings["hidden_size"] // settings["num_attention_heads"])


def _has(family: Family, settings: Mapping[str, Any], name: str) -> bool:
    return name in family.settings and bool(settings.get(name, False))


def _is_stored(modules: Sequence[Module], checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has all parameters in their shapes, and nothing else."""
    shapes = {name: shape for module in modules for name, shape in module.parameters().items()}
    return shapes == {name: tensor.shape for name, tensor in checkpoint.tensors.items()}


def _fits(modules: Sequence[Module], adapter: Adapter, tied: bool) -> bool:
    """Whether every scale and bias has its place, and none is in a weight that is shared."""
    by_path = {module.path: module for module in modules}
    if tied and f"{_PREFIX}embed_tokens" in adapter.scales:
        return False
    scaled = all(
        path in by_path and _scale_fits(by_path[path], scale)
        for path, scale in adapter.scales.items()
    )
    return scaled and all(
        path in by_path and by_path[path].bias and bias.shape == (by_path[path].outputs,)
        for path, bias in adapter.biases.items()
    )


def _scale_fits(module: Module, scale: Scale) -> bool:
    if scale.side == "input":
        return module.kind == "linear" and scale.values.shape == module.shape[1:]
    return scale.values.shape == (module.outputs,)


def _rule(module: Module, name: str, adapter: Adapter) -> Rule | None:
    if module.path not in adapter.scales:
        return None
    output = adapter.scales[module.path].side == "output"
    if name.endswith(".bias"):
        return "bias" if output else "trained bias" if module.path in adapter.biases else None
    if module.kind == "linear":
        return "rows" if output else "columns"
    return "columns" if module.kind == "embedding" else module.kind
