"""Decoding with a cache of fixed size; on CUDA one step is captured as a graph and replayed.

A step of one token runs hundreds of small kernels, which the host takes longer to launch than a GPU to run. Captured once,
a step is one launch. That asks for tensors that stay where they are: the cache is transformers' `StaticCache`, and tokens,
position and mask are written in place. On the CPU the calls of a `FusedStep` are recorded as well, where they repeat.

The prompt is read with a growing cache, whose attention costs what the prompt costs and not what the fixed cache could hold,
and is then moved over, layer by layer.

Legend: B sequences, T tokens of the prompt, S tokens the cache has room for, V vocabulary.
"""

from typing import Final, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from quantlab.architectures.detect import of_model_type
from quantlab.errors import CacheError, DeviceError
from quantlab.runtime.cache import cached
from quantlab.runtime.device import check_room, free_bytes, ran_out
from quantlab.runtime.experts import Experts
from quantlab.runtime.step import FusedStep
from quantlab.runtime.step_parts import LENGTH_DEPENDENT, ModelParts, NotFused, parts_of

_WARM_UPS: Final = 2
"""Steps that run before one is captured: kernels are compiled and memory is taken in the first."""


def capturable(model: PreTrainedModel) -> bool:
    """Whether a step of the model can be captured: nothing in it may wait for the device.

    Experts wait where their kernels take not the model's dtype or not the layout of their weights; rotary embeddings that depend
    on the length of the text wait to learn it.
    """
    return all(
        module.routes_on_device(model.dtype)
        if isinstance(module, Experts)
        else getattr(module, "rope_type", None) not in LENGTH_DEPENDENT
        for module in model.modules()
    )


class Decoder:
    """Reads prompts into a fixed cache and decodes from it.

    Args:
        model: of `runtime.load` or `runtime.random_twin`.
        batch: sequences, B.
        length: tokens per sequence, prompt included, S.
        capture: whether a step is captured; None for yes on CUDA where the model is `capturable`.
        fuse: whether a step is a `FusedStep` where the model has `parts_of` one; else it is transformers'. A fused step does not
            call the modules of the model: hooks on layers see the prompts only.

    Attributes:
        not_fused: why steps are transformers', None where they are fused.

    Raises:
        CacheError: the model attends to fewer than `length` tokens, in windows, or by flash attention, which takes no mask;
            or it is to be captured and cannot be.
    """

    def __init__(
        self, model: PreTrainedModel, *, batch: int, length: int, capture: bool | None = None, fuse: bool = True
    ) -> None:
        architecture = of_model_type(model.config.model_type)
        assert architecture is not None, "a model of the runtime"
        longest = architecture.context_length(model.config.to_dict())
        if not 0 < length <= longest or batch < 1:
            raise CacheError(
                "the cache is of a size the model cannot use",
                where="decoding with a fixed cache",
                found=f"{batch} sequences of {length} tokens, the model attends to 1 … {longest}",
                fix="ask for a shorter context",
            )
        self.batch, self.length = batch, length
        self._model, self._device = model, model.device
        can = self._device.type == "cuda" and capturable(model)
        if capture and not can:
            raise _not_capturable(model)
        self.captures = can if capture is None else capture
        self._cache = StaticCache(config=model.config, max_cache_len=length)
        kinds = {type(layer).__name__ for layer in self._cache.layers} - {StaticLayer.__name__}
        if kinds or model.config._attn_implementation == "flash_attention_2":
            raise CacheError(
                "the model attends in a way a fixed cache does not serve",
                where="decoding with a fixed cache",
                found=", ".join(sorted(kinds)) or "flash_attention_2",
                fix="use generate, with the cache it makes itself, or another implementation of attention",
            )
        self._adds = model.config._attn_implementation == "eager"
        self._used = 0
        self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=self._device)
        self._position = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._padding = torch.zeros(batch, 1, dtype=torch.int64, device=self._device)
        self._places = torch.arange(length, device=self._device)
        self._parts = parts_of(model) if fuse else NotFused("fused steps were not asked for")
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
        """Tokens per sequence in the cache, padding included."""
        return self._used

    @property
    def path(self) -> str:
        """How a step runs, for people: "captured, fused steps", "fused steps", "single steps"."""
        ways = ["captured"] * self.captures + ["fused"] * self.fuses
        return ", ".join(ways or ["single"]) + " steps"

    @torch.inference_mode()
    def prefill(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read prompts into the emptied cache.

        Args:
            ids: [B, T].
            attention_mask: [B, T], 0 for padding, which stands before a prompt; None if there is none.

        Returns:
            [B, V] logits of the token after each prompt.

        Raises:
            CacheError: not B sequences, or more than S tokens.
            DeviceError: the cache does not fit into memory, or memory ran out while the prompts were read.
        """
        batch, tokens = ids.shape
        self._check_size(batch, tokens, sequences={self.batch})
        if not self._cache.layers[0].is_initialized:
            one = DynamicCache(config=self._model.config)
            self._model(input_ids=self._tokens[:1], **cached(one))
            self._check_room(one)
        free, self._used = free_bytes(self._device), 0
        logits = self._read(ids, attention_mask)
        if logits is None:
            raise _no_room_to_read(free, self._device, where=f"{self._name()}, prompts of {tokens}")
        self._used = tokens
        return logits

    @torch.inference_mode()
    def fill(self, cache: DynamicCache) -> None:
        """Begin with what a growing cache holds: prompts without padding of B sequences, or of one that all share.

        Raises:
            CacheError: of neither B sequences nor one, or of more than S tokens.
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
                found=f"{batch} sequences of {tokens} tokens, made for {self.batch} of 1 … {self.length}",
                fix="make a cache for as many sequences and tokens",
            )

    def _check_room(self, held: DynamicCache) -> None:
        """Whether there is room for the fixed cache, by what the tokens of a growing one take."""
        count = held.get_seq_length() * held.layers[0].keys.shape[0]
        taken = sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in held.layers)
        check_room(self.batch * self.length * taken // count, self._device, where=self._name())

    def _name(self) -> str:
        return f"a cache of {self.batch} sequences of {self.length} tokens"

    def _read(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """Logits of `prefill`; None if memory ran out: the error would keep what was computed alive, so it ends here."""
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(torch.int64)
        growing = DynamicCache(config=self._model.config)
        try:
            output = self._model(
                input_ids=ids.to(self._device),
                attention_mask=None if attention_mask is None else mask.to(self._device),
                position_ids=(mask.cumsum(1) - 1).clamp_min(0).to(self._device),
                **cached(growing),
                logits_to_keep=1,
            )
            self._cache.reset()
            for index, layer in enumerate(growing.layers):
                self._cache.update(layer.keys, layer.values, index)
                layer.keys = layer.values = None
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            return None
        self._padding.copy_((1 - mask).sum(1, keepdim=True))
        self._position.fill_(ids.shape[1])
        return cast("Tensor", output.logits[:, -1])

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Decode one more token of each sequence.

        Args:
            tokens: [B] or [B, 1], what follows the tokens in the cache.

        Returns:
            [B, V] logits of the tokens after those. Where steps are captured the next one overwrites them.

        Raises:
            CacheError: the cache is full or empty.
        """
        if not 0 < self._used < self.length:
            raise CacheError(
                "the cache is full" if self._used else "the cache is empty",
                where="decoding with a fixed cache",
                found=f"{self._used} of {self.length} tokens",
                fix="make a longer cache" if self._used else "read a prompt first",
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
        """Forget all but the first `used` tokens; a decode can then be repeated from there."""
        assert 0 < used <= self._used, f"{used} of {self._used} tokens"
        self._back(self._used - used)
        self._used = used

    def generate(self, ids: Tensor, count: int, attention_mask: Tensor | None = None) -> Tensor:
        """The prompts [B, T] with `count` tokens after each, always the likeliest: [B, T + count].

        Raises:
            CacheError: they do not fit the cache; nothing is computed then.
        """
        if ids.shape[1] + count - 1 > self.length:
            raise CacheError(
                "the text does not fit the cache",
                where="decoding with a fixed cache",
                found=f"{ids.shape[1]} and {count} new tokens, room for {self.length}",
                fix="make a longer cache, or ask for fewer tokens",
            )
        logits = self.prefill(ids, attention_mask)
        found = [ids.to(self._device)]
        for number in range(count):
            found.append(logits.argmax(-1, keepdim=True))
            if number + 1 < count:
                logits = self.step(found[-1])
        return torch.cat(found, dim=1)

    def _step(self) -> Tensor:
        """One step on the tensors that stay in place; nothing in it waits for the device."""
        if isinstance(self._parts, ModelParts):
            if self._fused is None:
                self._fused = FusedStep(self._model, self._parts, self._cache, self._position, self._padding)
            logits = self._fused(self._tokens)
            self._position += 1
            return logits
        mask = ((self._places <= self._position) & (self._places >= self._padding))[:, None, None, :]
        if self._adds:
            least = torch.finfo(self._model.dtype).min
            mask = torch.zeros(mask.shape, dtype=self._model.dtype, device=self._device).masked_fill(~mask, least)
        output = self._model(
            input_ids=self._tokens,
            attention_mask=mask,
            position_ids=self._position - self._padding,
            **cached(self._cache),
        )
        self._position += 1
        return cast("Tensor", output.logits[:, -1])

    def _back(self, tokens: int) -> None:
        self._position -= tokens
        if not self.fuses:  # a fused step reads the position alone
            for layer in self._cache.layers:
                layer.cumulative_length -= tokens

    def _capture_step(self) -> None:
        """Capture a step, on the device of the model: that need not be the current one."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    self._step()
                    self._back(1)
            torch.cuda.current_stream(self._device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):  # torch's own stream is of the device that captured first
                self._logits = self._step()
            self._graph = graph


def _no_room_to_read(free: int | None, device: torch.device, *, where: str) -> DeviceError:
    left = "the memory" if free is None else f"the {free:,} bytes"
    return DeviceError(
        "memory ran out while prompts were read",
        where=where,
        found=f"more bytes needed than {left} free on {device} before",
        fix="read fewer or shorter prompts at once, or use a device with more memory",
    )


def _not_capturable(model: PreTrainedModel) -> CacheError:
    on_cpu = model.device.type != "cuda"
    return CacheError(
        "a step of this model cannot be captured",
        where="decoding with a fixed cache",
        found=f"a model on {model.device}"
        if on_cpu
        else f"experts whose kernels do not take {model.dtype} and their layout, or rotary embeddings that depend on the length",
        fix="leave `capture` out: the steps then run one by one"
        + ("" if on_cpu else ", or load the model in bfloat16 or float16, its experts of a scheme the kernels take"),
    )
