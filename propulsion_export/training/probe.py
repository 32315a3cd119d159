"""Find out which tokens a language model's logits depend on, by changing tokens."""

from typing import Any

import torch

_TOKENS = 4  # in each of two passages


def looks_ahead(model: Any) -> bool:
    """Whether a token's logits depend on later tokens; training such a model teaches copying."""
    ids = _ids(model)
    mask = torch.ones_like(ids)
    before, after = (
        _logits(model, input_ids=variant, attention_mask=mask)[:, :_TOKENS]
        for variant in (ids, _changed(ids, slice(_TOKENS, None)))
    )
    return _differ(before, after, model.dtype)


def leaks_in_a_block(model: Any) -> bool:
    """Whether a passage's logits depend on the passage before it in a block; see `packing`."""
    ids = _ids(model)
    positions = torch.arange(_TOKENS, device=ids.device).repeat(2)[None]
    before, after = (
        _logits(model, input_ids=variant, position_ids=positions)[:, _TOKENS:]
        for variant in (ids, _changed(ids, slice(_TOKENS)))
    )
    return _differ(before, after, model.dtype)


def _ids(model: Any) -> torch.Tensor:
    """Token ids that are far apart, shape [1, 2 * _TOKENS]."""
    size: int = model.get_input_embeddings().num_embeddings
    ids = torch.arange(1, 2 * _TOKENS + 1)[None] * 7919 % size
    return ids.to(model.device)


def _changed(ids: torch.Tensor, where: slice) -> torch.Tensor:
    changed = ids.clone()
    changed[:, where] = ids[:, where].flip(-1)
    return changed


@torch.no_grad()
def _logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    logits = model(**inputs, use_cache=False).logits
    return torch.as_tensor(logits, dtype=torch.float32)


def _differ(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether they differ by more than the rounding of a mixture of experts on other tokens."""
    allowed = torch.finfo(dtype).eps ** 0.5 * left.abs().max()
    return bool((left - right).abs().max() > allowed)
