"""Run PyTorch models as callables from tensors to tensors."""

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from propulsion_export.artifacts.artifact import Artifact, Runner, Tensors
from propulsion_export.artifacts.tensor_names import LOGITS, PAST, PRESENT
from propulsion_export.base_model.block_attention import check_one_attention
from propulsion_export.base_model.caches import check_cache
from propulsion_export.base_model.eos_pooling import check_eos, pools_at_eos
from propulsion_export.base_model.loading import load_base
from propulsion_export.base_model.model_inputs import check_inputs
from propulsion_export.base_model.rope_switch import rope_switches
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.errors import BaseModelError, ToolError
from propulsion_export.runners.decoding import Candidate, CausalModel, EncoderDecoder

_KINDS = ("key", "value")


def open_checkpoint(artifact: Artifact, *, trust_remote_code: bool = False) -> Candidate:
    """Run a merged checkpoint; see `torch_candidate`."""
    merged = load_base(
        str(artifact.directory),
        task=artifact.manifest.task,
        dtype=getattr(torch, artifact.manifest.dtype),
        trust_remote_code=trust_remote_code,
    )
    merged.check_complete(())
    generates = TASKS[artifact.manifest.task].generates
    where, config = str(artifact.directory), merged.model.config
    check_one_attention(config, where)
    check_inputs(type(merged.model), config, where, generates=generates, images=True)
    if rope_switches(merged.model.config.to_dict()):
        _compute_one_at_a_time(merged.model)
    return torch_candidate(merged.model, artifact.manifest.task)


def _compute_one_at_a_time(model: Any) -> None:
    """Let threads wait: the model writes a batch's rotary frequencies into itself."""
    lock = threading.Lock()

    def acquire(*_: Any) -> None:
        lock.acquire()

    def release(*_: Any) -> None:
        lock.release()

    model.register_forward_pre_hook(acquire)
    model.register_forward_hook(release, always_call=True)  # after an error too


def torch_candidate(model: Any, task: str) -> Candidate:
    """A torch model as a callable from tensors to tensors, or as a generator if it generates."""
    architecture = TASKS[task].architecture
    if architecture == "decoder":
        return CausalModel(torch_decoder_runner(model))
    if architecture == "encoder-decoder":
        return EncoderDecoder(
            torch_encoder_runner(model),
            torch_cross_decoder_runner(model),
            _first_token(model),
        )
    runner = torch_runner(model)
    return eos_row_by_row(runner, model.config) if pools_at_eos(model.config, task) else runner


def eos_row_by_row(run: Runner, config: Any) -> Runner:
    """Run each row alone, which a classifier that reads end-of-sequence tokens needs.

    transformers refuses a batch whose rows have different numbers of these tokens.

    Raises:
        DataError: raised by the runner for a row without such a token.
    """

    def run_rows(inputs: Tensors) -> Tensors:
        check_eos(inputs["input_ids"], config)
        rows = len(inputs["input_ids"])
        each = [run({name: v[row : row + 1] for name, v in inputs.items()}) for row in range(rows)]
        return {
            name: np.concatenate([one[name] for one in each])
            for name, values in each[0].items()
            if len(values) == 1
        }

    return run_rows


def _first_token(model: Any) -> int:
    """The token that the decoder begins with; see `generation_settings.first_decoder_token`."""
    settings = model.generation_config
    named = (
        settings.decoder_start_token_id,
        getattr(model.config, "decoder_start_token_id", None),
        settings.bos_token_id,
    )
    token = next(token for token in named if token is not None)
    return int(token[0] if isinstance(token, list) else token)


def torch_runner(model: Any) -> Runner:
    """Run a torch module; outputs other than tensors (caches) are left out.

    Raises:
        ToolError: raised by the runner when the model fails on its inputs.
    """
    device = next(model.parameters()).device

    def run(inputs: Tensors) -> Tensors:
        with torch_errors(model, inputs), torch.inference_mode():
            return output_arrays(model(**tensors_on(device, inputs)))

    return run


@contextmanager
def torch_errors(model: Any, inputs: Tensors) -> Iterator[None]:
    """Name the model and its inputs when it fails on them.

    Raises:
        ToolError: the model failed inside the block.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        shapes = ", ".join(f"{name} {list(np.shape(v))}" for name, v in inputs.items())
        raise ToolError(
            f"{type(model).__name__}: the model failed on inputs {shapes} ({error})"
        ) from error


def output_arrays(outputs: Mapping[str, Any]) -> Tensors:
    """The tensors among a model's outputs as arrays."""
    return {
        name: _to_numpy(value) for name, value in outputs.items() if isinstance(value, torch.Tensor)
    }


def torch_decoder_runner(model: Any) -> Runner:
    """Run one step of a causal language model as its graph does, see `decoding`.

    Without a cache among its inputs it starts with an empty one.

    Raises:
        BaseModelError: the model keeps a state other than keys and values; the runner raises it
            when the model returns no cache.
    """
    step = torch_step(model)

    def run(inputs: Tensors) -> Tensors:
        cache = _cache(tensors_on(model.device, inputs), "", model.dtype)
        logits = step(inputs, cache)
        return {LOGITS: _to_numpy(logits), **dict(_present(cache, ""))}

    return run


def torch_step(model: Any) -> Callable[[Tensors, DynamicCache], torch.Tensor]:
    """One step of a causal language model: its logits; the step lengthens the cache in place.

    Raises:
        BaseModelError: the model keeps a state other than keys and values; the step raises it when
            the model returns no cache.
    """
    check_cache(model)
    taken = ["input_ids", "attention_mask"]
    if "position_ids" in inspect.signature(model.forward).parameters:
        taken.append("position_ids")

    def step(inputs: Tensors, cache: DynamicCache) -> torch.Tensor:
        given = tensors_on(model.device, {name: inputs[name] for name in taken})
        with torch.inference_mode():
            outputs = model(**given, cache=cache, use_cache=True)
        if outputs.get("cache") is None:
            raise BaseModelError(
                f"{type(model).__name__}: returns no cache, expected a model that generates text"
            )
        logits: torch.Tensor = outputs.logits
        return logits

    return step


def torch_encoder_runner(model: Any) -> Runner:
    """Run the encoder of an encoder-decoder: `input_ids` to `last_hidden_state`."""
    encoder = torch_runner(model.get_encoder())

    def run(inputs: Tensors) -> Tensors:
        return encoder({name: inputs[name] for name in ("input_ids", "attention_mask")})

    return run


def torch_cross_decoder_runner(model: Any) -> Runner:
    """Run one step of an encoder-decoder's decoder as its graphs do, see `decoding`.

    Its cache holds keys and values of the decoder's tokens, `past_key_values.N.decoder.key`, and
    of the encoder's output, `past_key_values.N.encoder.key`.
    """

    def run(inputs: Tensors) -> Tensors:
        tensors = tensors_on(model.device, inputs)
        with torch.inference_mode():
            own, cross = (_cache(tensors, part, model.dtype) for part in ("decoder.", "encoder."))
            outputs = model(
                decoder_input_ids=tensors["input_ids"],
                attention_mask=tensors["encoder_attention_mask"],
                encoder_outputs=BaseModelOutput(
                    last_hidden_state=tensors["encoder_hidden_states"].to(model.dtype)
                ),
                cache=EncoderDecoderCache(own, cross),
                use_cache=True,
            )
        present = {**dict(_present(own, "decoder.")), **dict(_present(cross, "encoder."))}
        return {LOGITS: _to_numpy(outputs.logits), **present}

    return run


def tensors_on(device: torch.device, inputs: Tensors) -> dict[str, torch.Tensor]:
    """Arrays as tensors on a device."""
    return {
        name: torch.from_numpy(np.asarray(values)).to(device) for name, values in inputs.items()
    }


def _cache(tensors: dict[str, torch.Tensor], part: str, dtype: torch.dtype) -> DynamicCache:
    """The fed cache as a transformers cache whose layers keep all positions, as in the graph."""
    cache = DynamicCache()
    layers = sum(name.startswith(f"{PAST}.") and f".{part}key" in name for name in tensors)
    for index in range(layers):
        pair = (tensors[f"{PAST}.{index}.{part}{kind}"].to(dtype) for kind in _KINDS)
        cache.update(*pair, index)
    return cache


def _present(cache: DynamicCache, part: str) -> Iterator[tuple[str, Any]]:
    for index, layer in enumerate(cache.layers):
        for kind in _KINDS:
            yield f"{PRESENT}.{index}.{part}{kind}", _to_numpy(getattr(layer, f"{kind}s"))


def _to_numpy(value: torch.Tensor) -> Any:
    # numpy has no bfloat16; float32 holds every bfloat16 exactly.
    return (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
