"""Which modules of a base model an adapter scales."""

from collections import defaultdict
from types import SimpleNamespace

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from propulsion_export.base_model.model_fingerprint import inner_base_model, output_embeddings
from propulsion_export.errors import UsageError
from propulsion_export.scaling.expert_rules import is_experts, reason_against_experts
from propulsion_export.scaling.layer_rules import is_plain_linear, layer_kind
from propulsion_export.tuning.config import PRESETS, PropulsionConfig

_QKV = ("q_proj", "k_proj", "v_proj")
_QUERY_KEY_VALUE = ("query", "key", "value")

# Query, key and value projections by model type: endings of the path; a fused one is one name.
ATTENTION_NAMES: dict[str, tuple[str, ...] | str] = {
    "albert": _QUERY_KEY_VALUE,
    "bart": _QKV,
    "bert": _QUERY_KEY_VALUE,
    "blip-2": ("q", "k", "v", *_QKV, *_QUERY_KEY_VALUE, "qkv"),
    "bloom": ("query_key_value",),
    "btlm": ("c_attn",),
    "camembert": _QUERY_KEY_VALUE,
    "chatglm": ("query_key_value",),
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "key_proj", "value_proj"),
    "distilbert": ("q_lin", "k_lin", "v_lin"),
    "electra": _QUERY_KEY_VALUE,
    "falcon": ("query_key_value",),
    "gemma": _QKV,
    "gemma2": _QKV,
    "gemma3_text": _QKV,
    # A pattern for the whole path: its vision and audio parts use the same names.
    "gemma4": r"(.*\.)?language_model\..*\.(q_proj|k_proj|v_proj)",
    "gpt2": ("c_attn", "q_attn"),
    "gpt_bigcode": ("c_attn", "q_attn"),
    "gpt_neo": _QKV,
    "gpt_neox": ("query_key_value",),
    "gptj": _QKV,
    "layoutlm": _QUERY_KEY_VALUE,
    "llama": _QKV,
    "llama4": _QKV,
    "mistral": _QKV,
    "mixtral": _QKV,
    "modernbert": ("Wqkv",),
    "mpnet": ("attn.q", "attn.k", "attn.v"),
    "mpt": ("Wqkv",),
    "mt5": ("q", "k", "v"),
    "nemotron_h": _QKV,
    "opt": _QKV,
    "phi": _QKV,
    "phi3": ("qkv_proj",),
    "qwen2": _QKV,
    "qwen3": _QKV,
    "qwen3_moe": _QKV,
    "RefinedWeb": ("query_key_value",),
    "RefinedWebModel": ("query_key_value",),
    "roberta": _QUERY_KEY_VALUE,
    "rwkv": ("attention.receptance", "attention.key", "attention.value"),
    "rwkv7": ("attn.r_proj", "attn.k_proj", "attn.v_proj"),
    "stablelm": _QKV,
    "t5": ("q", "k", "v"),
    "xlm-roberta": _QUERY_KEY_VALUE,
}

# Embeddings of transformers models whose weight is read without calling the module, or which only
# hold a tied weight: a scale there would have no effect.
_UNSCALED_EMBEDDINGS = ("rel_embeddings", "shared", "query_position_embeddings", "ngram_embeddings")
# Both can use their children's weights without calling the children.
_PAST_THE_LAYER = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
# Projections whose weights a state space mixer passes to its kernel.
_UNSCALED_IN_MIXERS = ("x_proj", "dt_proj", "out_proj")


def resolve_targets(model: nn.Module, config: PropulsionConfig) -> frozenset[str]:
    """The paths of the modules in `model` that `config` scales, wrapped by earlier adapters or not.

    Raises:
        UsageError: nothing matches; a preset does not know the architecture; a module named by a
            list or a regular expression cannot be scaled, or is used under several names.
    """
    modules = _modules(model)
    if config.target_modules in PRESETS:
        selected = _preset(model, modules, config)
    else:
        selected = _named(model, modules, config)
    if not selected:
        raise UsageError(
            f"target_modules: {config.target_modules!r} matches no layer of "
            f"{type(model).__name__}, expected at least one",
            remedy="A list matches endings of module paths, a string is a regular expression for "
            "the whole path.",
        )
    _check_not_shared(model, selected)
    return frozenset(selected)


def is_excluded(config: PropulsionConfig, path: str) -> object | None:
    """PEFT's marker for an excluded module, or None; modules to save are excluded too."""
    result = check_target_module_exists(_matching(config, ".*"), path)
    return None if result else result


def _matching(config: PropulsionConfig, targets: object) -> SimpleNamespace:
    return SimpleNamespace(
        target_modules=targets,
        target_parameters=None,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save,
    )


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by path; for a wrapped one the original module."""
    modules: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not path or path.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (f"{path}.",)
            module = module.get_base_layer()
        modules[path] = module
    return modules


def _preset(model: nn.Module, modules: dict[str, nn.Module], config: PropulsionConfig) -> list[str]:
    targets: object = ".*"
    if config.target_modules == "attention":
        targets = _attention_names(model)
    matching = _matching(config, targets)
    heads = _heads(model, modules)
    matched = {
        path: module
        for path, module in modules.items()
        if path not in heads and check_target_module_exists(matching, path)
    }
    # A mixture has most weights in its experts: they are left out only by exclude_modules.
    _refuse(_reasons(model, {path: m for path, m in matched.items() if is_experts(m)}))
    return [
        path
        for path, module in matched.items()
        if is_experts(module) or layer_kind(module) in ("linear", "conv1d", "embedding")
        if not _reason_against(model, path, module)
    ]


def _reasons(model: nn.Module, matched: dict[str, nn.Module]) -> list[str]:
    return [
        f"{path}: {reason}"
        for path, module in matched.items()
        if (reason := _reason_against(model, path, module))
    ]


def _refuse(findings: list[str]) -> None:
    if findings:
        raise UsageError(*findings, remedy="Leave it out with exclude_modules.")


def _attention_names(model: nn.Module) -> tuple[str, ...] | str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in ATTENTION_NAMES:
        raise UsageError(
            f"target_modules: 'attention' is not known for model type {model_type!r}",
            remedy="Name the query, key and value projections by a regular expression, such as "
            r"'.*\.(q_proj|k_proj|v_proj)'.",
        )
    return ATTENTION_NAMES[model_type]


def _heads(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """The paths of all modules outside the base transformer inside `model`, and of its lm_head."""
    inner, head = inner_base_model(model), output_embeddings(model)
    inside = {id(module) for module in inner.modules()}
    if isinstance(head, BaseTunerLayer):
        head = head.get_base_layer()
    return {path for path, module in modules.items() if id(module) not in inside or module is head}


def _named(model: nn.Module, modules: dict[str, nn.Module], config: PropulsionConfig) -> list[str]:
    matching = _matching(config, config.target_modules)
    matched = {
        path: module
        for path, module in modules.items()
        # A pattern such as '.*' also matches containers of layers and modules without weights.
        if (layer_kind(module) or is_experts(module) or _looks_scalable(module))
        and check_target_module_exists(matching, path)
    }
    _refuse(_reasons(model, matched))
    return list(matched)


def _looks_scalable(module: nn.Module) -> bool:
    """Whether a user may expect this module of unknown kind to be scaled."""
    if next(module.children(), None) is not None:
        return isinstance(module, nn.MultiheadAttention)
    has_weights = next(module.parameters(recurse=False), None) is not None
    return has_weights or hasattr(module, "in_features")


def _reason_against(model: nn.Module, path: str, module: nn.Module) -> str | None:
    """Why a scale on this module would have no exact effect, or None."""
    if is_experts(module):
        return reason_against_experts(module)
    if layer_kind(module) is None:
        return (
            f"is a {type(module).__name__}, which cannot be scaled, expected a linear layer, an "
            "embedding, experts or a norm"
        )
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    if _is_read_without_call(model, parent, name):
        reader = type(parent).__name__
        return f"{reader} reads its weight without calling it, so a scale would have no effect"
    if _is_other_than_linear(module):
        return f"a {type(module).__name__} does not compute what nn.Linear does"
    return None


def _is_read_without_call(model: nn.Module, parent: nn.Module, name: str) -> bool:
    if isinstance(parent, _PAST_THE_LAYER) or type(parent).__name__ == "WavLMAttention":
        return True
    if hasattr(parent, "A_log") and hasattr(parent, "ssm_state_size"):
        return name in _UNSCALED_IN_MIXERS
    from_transformers = hasattr(getattr(model, "config", None), "model_type")
    return from_transformers and name in _UNSCALED_EMBEDDINGS


def _is_other_than_linear(module: nn.Module) -> bool:
    """Whether it is a router or the like; a quantised layer of another package counts as linear."""
    from_transformers = type(module).__module__.startswith("transformers.models.")
    return isinstance(module, nn.Linear) and from_transformers and not is_plain_linear(module)


def _check_not_shared(model: nn.Module, selected: list[str]) -> None:
    names = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(path)
    shared = [
        f"{path}: is the same module as {others[0]}, which would stay unscaled"
        for path in selected
        if (others := [name for name in names[id(model.get_submodule(path))] if name != path])
    ]
    if shared:
        raise UsageError(*shared, remedy="Leave it out with exclude_modules.")
