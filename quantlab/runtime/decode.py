"""Decoding with a KV cache of fixed size; on CUDA one step is captured as a CUDA graph and replayed.

A step of one token runs hundreds of small kernels, which take longer to launch than to run. A captured step is one
launch. A graph requires tensors at fixed addresses: the cache is transformers' `StaticCache`, and tokens, position and
mask are updated in place. On the CPU the kernel calls of a `FusedStep` are recorded and replayed if they do not depend
on the tokens.

The prompt is read with a growing cache, so that the cost of attention depends on the length of the prompt and not on
the capacity of the fixed cache. It is then copied to the fixed cache, layer by layer.

Legend: B sequences, T tokens of the prompt, S capacity of the cache in tokens, V vocabulary size.
"""

from typing import Final, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from quantlab.architectures.detect import of_model_type
from quantlab.errors import CacheError, DeviceError
from quantlab.runtime.cache_arguments import cache_arguments
from quantlab.runtime.decoding.fusable_parts import LENGTH_DEPENDENT, ModelParts, NotFused, parts_of
from quantlab.runtime.decoding.fused_step import FusedStep
from quantlab.runtime.device import check_free_memory, free_bytes, is_out_of_memory
from quantlab.runtime.modules.experts import Experts

_WARM_UPS: Final = 2
"""Steps that run before the capture, to compile kernels and allocate memory."""


def capturable(model: PreTrainedModel) -> bool:
    """Whether a step of the model can be captured, that is, no operation in it makes the host wait for the device.

    The host waits for the routing of experts whose dtype or layout the kernels do not support, and for the sequence
    length if rotary embeddings depend on it.
    """
    return all(
        module.routes_on_device(model.dtype)
        if isinstance(module, Experts)
        else getattr(module, "rope_type", None) not in LENGTH_DEPENDENT
        for module in model.modules()
    )


class Decoder:
    """Reads prompts into a cache of fixed size and decodes from it.

    Args:
        model: made by `runtime.load` or `runtime.random_twin`.
        batch: number of sequences, B.
        length: capacity in tokens per sequence, prompt included, S.
        capture: whether to capture a step as a CUDA graph; None captures on CUDA if the model is `capturable`.
        fuse: whether to use a `FusedStep` if `parts_of(model)` returns its parts; otherwise transformers' forward
            methods run. A fused step does not call the modules of the model, so hooks on layers fire for prompts only.

    Attributes:
        not_fused: the reason why steps are not fused; None if they are.

    Raises:
        CacheError: the context length of the model is shorter than `length`; the model uses sliding-window or flash
            attention, which take no mask; or `capture` is True and the model cannot be captured.
    """

    def __init__(
        self, model: PreTrainedModel, *, batch: int, length: int, capture: bool | None = None, fuse: bool = True
    ) -> None:
        architecture = of_model_type(model.config.model_type)
        assert architecture is not None, "a model of the runtime"
        longest = architecture.context_length(model.config.to_dict())
        if not 0 < length <= longest or batch < 1:
            raise CacheError(
                "the model does not support a cache of this size",
                where="decoding with a fixed cache",
                found=f"{batch} sequences of {length} tokens, the model supports 1 … {longest} tokens",
                fix="request a shorter context",
            )
        self.batch, self.length = batch, length
        self._model, self._device = model, model.device
        can_capture = self._device.type == "cuda" and capturable(model)
        if capture and not can_capture:
            raise _not_capturable(model)
        self.captures = can_capture if capture is None else capture
        self._cache = StaticCache(config=model.config, max_cache_len=length)
        kinds = {type(layer).__name__ for layer in self._cache.layers} - {StaticLayer.__name__}
        if kinds or model.config._attn_implementation == "flash_attention_2":
            raise CacheError(
                "the attention of the model does not support a fixed cache",
                where="decoding with a fixed cache",
                found=", ".join(sorted(kinds)) or "flash_attention_2",
                fix="call generate without a fixed cache, or use another attention implementation",
            )
        self._additive_mask = model.config._attn_implementation == "eager"
        self._used = 0
        self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=self._device)
        self._position = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._padding = torch.zeros(batch, 1, dtype=torch.int64, device=self._device)
        self._positions = torch.arange(length, device=self._device)
        self._parts = parts_of(model) if fuse else NotFused("fused steps are turned off")
        self.not_fused = self._parts.reason if isinstance(self._parts, NotFused) else None
        self._fused: FusedStep | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    @property
    def fuses(self) -> bool:
        """Whether steps are fused."""
        return self.not_fused is None

    @property
    def used(self) -> int:
        """Number of tokens per sequence in the cache, padding included."""
        return self._used

    @property
    def path(self) -> str:
        """Description of how steps run: "captured, fused steps", "fused steps", "single steps"."""
        ways = ["captured"] * self.captures + ["fused"] * self.fuses
        return ", ".join(ways or ["single"]) + " steps"

    @torch.inference_mode()
    def prefill(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Empty the cache and read prompts into it.

        Args:
            ids: [B, T].
            attention_mask: [B, T], 0 for padding, which must precede the prompt; None without padding.

        Returns:
            [B, V] logits of the token after each prompt.

        Raises:
            CacheError: the number of sequences is not B, or T exceeds S.
            DeviceError: the cache does not fit into memory, or memory ran out while the prompts were read.
        """
        batch, tokens = ids.shape
        self._check_size(batch, tokens, sequences={self.batch})
        if not self._cache.layers[0].is_initialized:
            one = DynamicCache(config=self._model.config)
            self._model(input_ids=self._tokens[:1], **cache_arguments(one))
            self._check_room(one)
        free, self._used = free_bytes(self._device), 0
        logits = self._read(ids, attention_mask)
        if logits is None:
            raise _no_room_to_read(free, self._device, where=f"{self._name()}, prompts of {tokens}")
        self._used = tokens
        return logits

    @torch.inference_mode()
    def fill(self, cache: DynamicCache) -> None:
        """Copy the prompts of a growing cache, without padding: B sequences, or one that all sequences share.

        Raises:
            CacheError: the number of sequences is neither B nor 1, or there are more than S tokens.
            DeviceError: the fixed cache does not fit into memory.
        """
        tokens = cache.get_seq_length()
        self._check_size(cache.layers[0].keys.shape[0] if tokens else 0, tokens, sequences={1, self.batch})
        if not self._cache.layers[0].is_initialized:
            self._check_room(cache)
        self._used = 0
        self._cache.reset()
        for index, layer in enumerate(cache.layers):
            keys, values = (held.expand(self.batch, *held.shape[1:]) for held in (layer.keys, layer.values))
            self._cache.update(keys, values, index)
        self._padding.zero_()
        self._position.fill_(tokens)
        self._used = tokens

    def _check_size(self, batch: int, tokens: int, *, sequences: set[int]) -> None:
        if batch not in sequences or not 0 < tokens <= self.length:
            raise CacheError(
                "the prompts do not fit the cache",
                where="decoding with a fixed cache",
                found=f"{batch} sequences of {tokens} tokens, the cache has room for {self.batch} of 1 … {self.length}",
                fix="create the decoder for this number of sequences and tokens",
            )

    def _check_room(self, held: DynamicCache) -> None:
        """Raise DeviceError if the fixed cache does not fit, judged by the bytes per token of a growing cache."""
        count = held.get_seq_length() * held.layers[0].keys.shape[0]
        taken = sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in held.layers)
        check_free_memory(self.batch * self.length * taken // count, self._device, where=self._name())

    def _name(self) -> str:
        return f"a cache of {self.batch} sequences of {self.length} tokens"

    def _read(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """Logits of `prefill`; None if memory ran out.

        The exception is not passed on, because its traceback would keep the computed tensors alive.
        """
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(torch.int64)
        growing = DynamicCache(config=self._model.config)
        try:
            output = self._model(
                input_ids=ids.to(self._device),
                attention_mask=None if attention_mask is None else mask.to(self._device),
                position_ids=(mask.cumsum(1) - 1).clamp_min(0).to(self._device),
                **cache_arguments(growing),
                logits_to_keep=1,
            )
            self._cache.reset()
            for index, layer in enumerate(growing.layers):
                self._cache.update(layer.keys, layer.values, index)
                layer.keys = layer.values = None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        self._padding.copy_((1 - mask).sum(1, keepdim=True))
        self._position.fill_(ids.shape[1])
        return cast("Tensor", output.logits[:, -1])

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Decode one more token of each sequence.

        Args:
            tokens: [B] or [B, 1], the next token of each sequence.

        Returns:
            [B, V] logits of the token after it. If steps are captured, the next step overwrites them.

        Raises:
            CacheError: the cache is full or empty.
        """
        if not 0 < self._used < self.length:
            raise CacheError(
                "the cache is full" if self._used else "the cache is empty",
                where="decoding with a fixed cache",
                found=f"{self._used} of {self.length} tokens",
                fix="create the decoder with a greater length" if self._used else "read a prompt first",
            )
        self._tokens.copy_(tokens.reshape(self.batch, 1))
        if self.captures and self._graph is None:
            self._capture_step()
        if self._graph is None:
            self._logits = self._step()
        else:
            self._graph.replay()
        self._used += 1
        assert self._logits is not None, "a step was run or captured"
        return self._logits

    @torch.inference_mode()
    def rewind(self, used: int) -> None:
        """Drop all but the first `used` tokens, so that decoding can be repeated from there."""
        assert 0 < used <= self._used, f"{used} of {self._used} tokens"
        self._step_back(self._used - used)
        self._used = used

    def generate(self, ids: Tensor, count: int, attention_mask: Tensor | None = None) -> Tensor:
        """Greedy decoding: the prompts [B, T] with `count` new tokens each, [B, T + count].

        Raises:
            CacheError: the tokens do not fit the cache; raised before anything is computed.
        """
        if ids.shape[1] + count - 1 > self.length:
            raise CacheError(
                "the generated text does not fit the cache",
                where="decoding with a fixed cache",
                found=f"{ids.shape[1]} prompt tokens and {count} new ones, the cache has room for {self.length}",
                fix="create the decoder with a greater length, or request fewer tokens",
            )
        logits = self.prefill(ids, attention_mask)
        found = [ids.to(self._device)]
        for number in range(count):
            found.append(logits.argmax(-1, keepdim=True))
            if number + 1 < count:
                logits = self.step(found[-1])
        return torch.cat(found, dim=1)

    def _step(self) -> Tensor:
        """Run one step on tensors at fixed addresses, without waiting for the device."""
        if isinstance(self._parts, ModelParts):
            if self._fused is None:
                self._fused = FusedStep(self._model, self._parts, self._cache, self._position, self._padding)
            logits = self._fused(self._tokens)
            self._position += 1
            return logits
        mask = ((self._positions <= self._position) & (self._positions >= self._padding))[:, None, None, :]
        if self._additive_mask:
            least = torch.finfo(self._model.dtype).min
            mask = torch.zeros(mask.shape, dtype=self._model.dtype, device=self._device).masked_fill(~mask, least)
        output = self._model(
            input_ids=self._tokens,
            attention_mask=mask,
            position_ids=self._position - self._padding,
            **cache_arguments(self._cache),
        )
        self._position += 1
        return cast("Tensor", output.logits[:, -1])

    def _step_back(self, tokens: int) -> None:
        self._position -= tokens
        if not self.fuses:  # a fused step reads the position tensor only
            for layer in self._cache.layers:
                layer.cumulative_length -= tokens

    def _capture_step(self) -> None:
        """Capture a step on the device of the model, which may differ from the current device."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    self._step()
                    self._step_back(1)
            torch.cuda.current_stream(self._device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, stream=stream
            ):  # torch's default stream belongs to the first device that captured
                self._logits = self._step()
            self._graph = graph


def _no_room_to_read(free: int | None, device: torch.device, *, where: str) -> DeviceError:
    left = "the amount" if free is None else f"the {free:,} bytes"
    return DeviceError(
        "memory ran out while prompts were read",
        where=where,
        found=f"more memory needed than {left} free on {device}",
        fix="read fewer or shorter prompts at once, or use a device with more memory",
    )


def _not_capturable(model: PreTrainedModel) -> CacheError:
    on_cpu = model.device.type != "cuda"
    return CacheError(
        "a step of this model cannot be captured as a CUDA graph",
        where="decoding with a fixed cache",
        found=f"a model on {model.device}"
        if on_cpu
        else f"experts without a kernel for their layout and {model.dtype}, or length-dependent rotary embeddings",
        fix="omit `capture`, so that steps run one by one"
        + (
            ""
            if on_cpu
            else ", or load the model in bfloat16 or float16 with experts in a scheme that has a CUDA kernel"
        ),
    )
