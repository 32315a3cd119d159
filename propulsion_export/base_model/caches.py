"""Whether a model that generates keeps nothing between its steps but keys and values."""

from typing import Any

from propulsion_export.errors import BaseModelError


def check_cache(model: Any) -> None:
    """Refuse a model with layers that keep another state: convolutions, recurrences, an index.

    A graph takes the cache as keys and values of every layer; another state would be lost.

    Raises:
        BaseModelError: naming the model's class and the layers.
    """
    kinds = [] if model._is_stateful else sorted(_other_layers(model.config))
    if not kinds and not model._is_stateful:
        return
    found = f" ({', '.join(kinds)})" if kinds else ""
    raise BaseModelError(
        f"{type(model).__name__}: keeps a state that is no cache of keys and values{found}, "
        "expected attention layers only",
        remedy="train and merge take it; generate with transformers.",
    )


def _other_layers(config: Any) -> set[str]:
    """The classes of cache layers that transformers makes for a model, but for keys and values."""
    from transformers import cache_utils

    cache = cache_utils.DynamicCache(config=config)
    others = (cache_utils.LinearAttentionCacheLayerMixin, cache_utils.DynamicIndexedLayer)
    # A dummy stands for a layer that keeps nothing, or shares the keys of another.
    plain = (cache_utils.DynamicLayer, cache_utils.DummyLayer)
    return {
        type(layer).__name__
        for layer in cache.layers
        if isinstance(layer, others) or not isinstance(layer, plain)
    }
