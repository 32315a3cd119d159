"""Which inputs a model is for beside tokens, their mask and their types, and which it cannot get.

A model that is run without an input it was made for computes something else without a word: a
LayoutLM takes every word to stand at the upper left corner. So whatever the forward of a model
takes is either known here to be optional, traced as an input of its own, or refused by name.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from propulsion_export.errors import BaseModelError, UsageError

Array = npt.NDArray[Any]
Source = Literal["zeros", "tokenizer", "caller"]
ZERO_FOR_TEXTS = frozenset({"task_type_ids"})  # as transformers has it
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# What a forward takes beside the text that may be left out: the answers to learn from, what it
# returns, what it keeps for the next call, and what it works out from the tokens itself.
_OPTIONAL = frozenset(
    # learning
    {"labels", "start_positions", "end_positions", "return_loss", "next_sentence_label"}
    | {"sentence_order_label", "cls_index", "p_mask", "is_impossible", "entity_labels"}
    | {"bbox_first_token_mask"}
    # returning
    | {"return_dict", "output_hidden_states", "output_attentions", "output_router_logits"}
    | {"logits_to_keep", "self"}
    # keeping
    | {"cache", "past_key_values", "use_cache", "mems", "use_mems", "state", "past_buckets_states"}
    | {"encoder_outputs", "mm_encoder_outputs", "cache_position", "shared_kv_states"}
    # worked out from the tokens, or another way to give them
    | {"inputs_embeds", "position_ids", "lengths", "num_hashes", "per_layer_inputs"}
    | {"ple_input_ids", "patch_lengths", "sequence_id", "question_lengths", "question_positions"}
    | {"global_attention_mask", "perm_mask", "target_mapping", "input_mask", "head_mask"}
    # of a decoder, whose tokens are generated, and of an encoder that another model feeds
    | {"decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"}
    | {"decoder_position_ids", "encoder_hidden_states", "encoder_attention_mask"}
    | {"visual_pos_masks", "deepstack_visual_embeds"}
)
_PLAIN = {"bool", "int", "float", "str"}
# Beginnings of the names of what a text may come without.
_SENSES = (
    *("pixel_", "image_", "interpolate_pos", "video_", "vision_", "visual_", "input_features"),
    *("audio_", "mm_"),
)
# Blt, which reads texts, has these from Mllama, whose other inputs are refused.
_INSIDE = frozenset(
    {"cross_attention_states", "cross_attention_mask", "full_text_row_masked_out_mask"}
)


@dataclass(frozen=True)
class ExtraInput:
    """An input with numbers for every token, [batch, sequence, …], that a graph has too.

    Attributes:
        name: as the model's forward has it.
        below: every number is below this one.
        source: what it is for a text: zeros, as transformers has it; what the tokenizer returns;
            or nothing, because only a caller knows it.
        size: how many numbers a token has; None for one without a dimension of its own.
        meaning: what it says about the tokens.
    """

    name: str
    below: int
    source: Source
    meaning: str
    size: int | None = None

    @property
    def dimensions(self) -> int:
        return 2 if self.size is None else 3

    @property
    def shape(self) -> str:
        """The shape in words."""
        return "[batch, sequence" + ("]" if self.size is None else f", {self.size}]")

    def draw(self, chooser: np.random.Generator, shape: tuple[int, int]) -> Array:
        """Random numbers that a model accepts, int64 [batch, sequence, …].

        Those of a box are sorted: left is not right of right.
        """
        if self.size is None:
            return chooser.integers(0, self.below, shape)
        corners = np.sort(chooser.integers(0, self.below, (*shape, 2, self.size // 2)), axis=2)
        return corners.reshape(*shape, self.size)

    def zeros(self, like: Array) -> Array:
        """Zeros for tokens, int64 [batch, sequence, …]."""
        return np.zeros((*like.shape, *(() if self.size is None else (self.size,))), np.int64)


def extra_inputs(config: Any) -> tuple[ExtraInput, ...]:
    """The inputs beside a text's that a graph of this model has, from its configuration."""
    of_kind = _BY_KIND.get(getattr(config, "model_type", ""))
    return () if of_kind is None else tuple(of_kind(config))


def check_inputs(
    model_class: type,
    config: Any,
    source: str,
    *,
    generates: bool = False,
    images: bool = False,
) -> None:
    """Refuse a model that is for inputs which it does not get here.

    Args:
        model_class: the model's class, whose forward names them.
        config: its configuration, which may have no use for some of them.
        source: the model's name or path.
        generates: whether it is to generate text, which no input but tokens goes with.
        images: whether inputs that a text may come without, images and sound, are let pass; a
            graph has none of them, and would not say so.

    Raises:
        BaseModelError: naming them.
    """
    extras = [e for e in extra_inputs(config) if e.source == "zeros" or not generates]
    taken = inspect.signature(model_class.forward).parameters  # type: ignore[attr-defined]
    known = {*TEXT_INPUTS, *_OPTIONAL, *_INSIDE, *(extra.name for extra in extras)}
    known |= _unused(config)
    strange = [
        name
        for name, parameter in taken.items()
        if name not in known
        and not _is_option(parameter)
        and not (images and name.startswith(_SENSES))
    ]
    if getattr(config, "type_vocab_sizes", None):  # TAPAS
        strange.append("token_type_ids of a table's cells")
    if "input_ids" not in taken and not strange:
        strange = ["other inputs than tokens"]
    if strange:
        more = f" and {len(strange) - 4} more" if len(strange) > 4 else ""
        raise BaseModelError(
            f"{source}: {model_class.__name__} is also for {', '.join(strange[:4])}{more}, "
            "expected a model of texts alone",
            remedy="Without them it would compute something else.",
        )


def check_text_is_enough(extras: Sequence[ExtraInput], where: str) -> None:
    """Refuse to read texts for a model that needs to know more about each token.

    Raises:
        UsageError: naming what it needs.
    """
    lacking = [extra for extra in extras if extra.source == "caller"]
    if lacking:
        raise UsageError(
            *(
                f"{where}: the model needs {extra.name}, {extra.meaning}, which no text gives"
                for extra in lacking
            ),
            remedy="Give a Session the model's inputs as tensors.",
        )


def _is_option(parameter: inspect.Parameter) -> bool:
    """Whether an argument is a switch or a number, not an input; code of a model may have any."""
    if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
        return True
    if isinstance(parameter.default, bool | int | float | str):
        return True
    annotation = parameter.annotation
    written = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    words = set(re.findall(r"\w+", written))
    return words <= {"Optional", "Union", "None", "NoneType", "typing", *_PLAIN} and bool(
        words & _PLAIN
    )


def _unused(config: Any) -> set[str]:
    """Arguments that this configuration has no weights for, or has a value for itself."""
    unused = set()
    if not _has_languages(config):
        unused.add("langs")
    if getattr(config, "default_language", None):  # X-MOD
        unused.add("lang_ids")
    if not getattr(config, "use_task_id", False):
        unused.add("task_type_ids")
    if not getattr(config, "enable_shape", True):  # RoCBert
        unused.add("input_shape_ids")
    if not getattr(config, "enable_pronunciation", True):
        unused.add("input_pronunciation_ids")
    return unused


def _has_languages(config: Any) -> bool:
    # A saved configuration leaves out what has its default.
    return getattr(config, "use_lang_emb", True) and getattr(config, "n_langs", 1) > 1


def _boxes(config: Any) -> Iterator[ExtraInput]:
    below = getattr(config, "max_2d_position_embeddings", 1024)
    meaning = "where a word stands on its page (left, top, right, bottom; 0 to 1000)"
    yield ExtraInput("bbox", min(below, 1001), "caller", meaning, 4)


def _languages(config: Any) -> Iterator[ExtraInput]:
    if _has_languages(config):
        yield ExtraInput("langs", config.n_langs, "caller", "the number of its language")


def _tasks(config: Any) -> Iterator[ExtraInput]:
    if getattr(config, "use_task_id", False):
        below = getattr(config, "task_type_vocab_size", 3)
        yield ExtraInput("task_type_ids", below, "zeros", "the number of the task")


def _shapes(config: Any) -> Iterator[ExtraInput]:
    if getattr(config, "enable_shape", True):
        below = getattr(config, "shape_vocab_size", 24858)
        yield ExtraInput("input_shape_ids", below, "tokenizer", "the shape of its sign")
    if getattr(config, "enable_pronunciation", True):
        below = getattr(config, "pronunciation_vocab_size", 910)
        yield ExtraInput("input_pronunciation_ids", below, "tokenizer", "its pronunciation")


_BY_KIND: dict[str, Callable[[Any], Iterator[ExtraInput]]] = {
    "layoutlm": _boxes,
    "lilt": _boxes,
    "xlm": _languages,
    "flaubert": _languages,
    "ernie": _tasks,
    "roc_bert": _shapes,
}
