"""The host's side of generation: lays out pages, drives the steps, collects tokens, keeps the cache.

A `Generator` gives each request its pages for good, in a block table, runs `prefill_step` over the prompts and then
`decode_steps` until every request is done. Shapes come from rounded sizes, so that calls of like size share programs.

Axes: b requests, w pages of a block-table row.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxattn.call import NO_TOP_K, Call, Choices, Draw, Sizes, check_call, pages_needed
from jaxattn.kv_scales import fp8_dtype
from jaxattn.models import decoder
from jaxattn.models.config import DecoderConfig
from jaxattn.models.weights import Params
from jaxattn.outputs import Outputs
from jaxattn.page_rings import allocate_pages
from jaxattn.steps import Draws, LogProbs, Requests, State, decode_steps, prefill_step


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes:
      tokens: the new tokens of each request; one that ended by an EOS token ends with it, one that ended by a stop
        string with the token that completed it.
      texts: of each request, `decode` of its tokens, up to the stop string that ended it; None without a `decode`.
      logprobs: natural logarithms of the probabilities of each request's tokens, in the model's own distribution,
        before temperature and limits; empty where not asked for.
      top_logprobs: likewise, of the likeliest tokens at each place: token to log-probability, the likeliest first.
      prompt_tokens: tokens of all prompts.
      compile_s: seconds of compilation; not in the next two.
      prefill_s: seconds from the first chunk until every prompt had its first new token.
      decode_s: seconds for all further tokens.
    """

    tokens: list[list[int]]
    texts: list[str] | None
    logprobs: list[list[float]]
    top_logprobs: list[list[dict[int, float]]]
    prompt_tokens: int
    compile_s: float
    prefill_s: float
    decode_s: float

    def summary(self) -> str:
        """Tokens per second, in a line."""
        # Prefill gives each request its first new token.
        decoded = sum(map(len, self.tokens)) - len(self.tokens)
        return (
            f"prefill {_rate(self.prompt_tokens, self.prefill_s)}, "
            f"decode {_rate(decoded, self.decode_s)}, "
            f"after {self.compile_s:.1f} s of compilation"
        )


class Generator:
    """Continues prompts with one model, call after call.

    Keeps what calls share: the KV cache and the rope table. It holds, from its first call on,

        2 * num_pages * page_size * num_kv_heads * head_dim * bytes of a number

    of device memory for each layer, beside the weights; with kv_dtype, 1 byte a number and 4 more for each head_dim of
    them. A layer that sees a window has pages for what the window reaches, and not for all of a context. A call that
    needs more pages than there are replaces the cache, and one that fails frees it; neither ever holds two. With
    `num_pages` and `max_context` given, nothing grows but the cache of windows that are not the widest.

    LongRoPE has other frequencies for contexts beyond the length that its model began with. A call takes those of the
    longest context that one of its requests may reach, prompt and new tokens: keys in the cache keep theirs.

    Compiled programs are kept by the process, the 32 used last, for every Generator of a like model. Calls share one if
    their sizes round to the same and their steps do the same: take the likeliest token of all requests, or draw, or
    draw with a top_k or top_p; with log-probabilities or without. Other lengths, tokens and values do not compile
    again.

    Args:
      params, config: from `load`.
      sizes: of pages, cache and chunks.
      kv_dtype: of the cache: None for the weights'; "fp8", which is float8_e4m3fn, or a float8 dtype: half the bytes
        of 16 bits, each token's keys and values scaled by head.
      backend: "triton", "xla", "interpret" or None, for every op.

    Raises:
      ValueError: the model cannot serve `sizes.max_context`; another kv_dtype.
    """

    def __init__(
        self,
        params: Params,
        config: DecoderConfig,
        sizes: Sizes | None = None,
        *,
        kv_dtype: DTypeLike | None = None,
        backend: str | None = None,
    ):
        self.params, self.config, self.backend = params, config, backend
        self.kv_dtype = params.embed_tokens.dtype if kv_dtype is None else fp8_dtype(kv_dtype)
        self.sizes = sizes or Sizes()
        if self.sizes.max_context:
            decoder.check_context(config, self.sizes.max_context)
        self._caches: decoder.Caches | None = None
        # By which of the model's rotary embeddings are stretched.
        self._cos_sin_caches: dict[tuple[bool, ...], tuple[jax.Array, ...]] = {}

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | np.ndarray,
        *,
        max_new_tokens: int | Sequence[int],
        stream: Callable[[int, list[int]], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
        **choices: Any,
    ) -> Generation:
        """Continues prompts, all in one batch. One call at a time uses the cache; another beside it makes its own.

        Args and raises: as `jaxattn.generate.generate`, whose temperature, top_k, top_p, min_p, stop, logprobs, seed,
        eos_token_ids and decode are `choices`.
        """
        call = check_call(
            self.config,
            self.sizes,
            prompts,
            max_new_tokens=max_new_tokens,
            choices=Choices(**choices),
        )
        batch = round_up(len(call.prompts))
        owned = pages_needed(self.config, self.sizes, call)
        caches = self._take_caches([sum(pages) for pages in owned])
        requests = self._requests(call, batch, owned, self._num_pages(caches))
        state = State(
            caches=caches,
            kv_len=jnp.zeros(batch, jnp.int32),
            token=jnp.zeros(batch, jnp.int32),
            generated=jnp.zeros(batch, jnp.int32),
            done=jnp.arange(batch, dtype=jnp.int32) >= len(call.prompts),
            logprobs=self._log(call, batch),
        )

        # Prompts end to end, cut into chunks; short ones do not pay for a long chunk.
        total = sum(map(len, call.prompts))
        chunk = min(self.sizes.prefill_chunk, round_up(total))
        laid_out = np.zeros(-(-total // chunk) * chunk, np.int32)
        laid_out[:total] = np.concatenate(call.prompts)
        outputs = Outputs(call, stream)

        try:
            started = time.perf_counter()
            options: dict[str, Any] = dict(
                config=self.config, sampling=call.sampling, backend=self.backend
            )
            first = (self.params, state, requests, jnp.zeros(chunk, jnp.int32), jnp.int32(0))
            run_prefill = _compile(prefill_step, *first, **options)
            num_steps = self.sizes.stream_every
            run_decode = _compile(decode_steps, *first[:3], num_steps=num_steps, **options)
            del first, caches  # donated from here on
            compiled = time.perf_counter()

            for begin in range(0, total, chunk):
                tokens = jnp.asarray(laid_out[begin : begin + chunk])
                state = run_prefill(self.params, state, requests, tokens, jnp.int32(begin))
                if progress:
                    state.token.block_until_ready()
                    progress(min(begin + chunk, total), total)
            state = _taken(state, state.token[None, :], outputs)
            prefilled = time.perf_counter()

            while not np.asarray(state.done).all():
                state, tokens = run_decode(self.params, state, requests)
                state = _taken(state, tokens, outputs)
            decoded = time.perf_counter()
        except BaseException:
            # The traceback keeps this frame alive, and must not keep a cache.
            for array in jax.tree.leaves(state.caches):
                array.delete()
            raise
        self._caches = state.caches
        return Generation(
            outputs.tokens,
            outputs.texts(),
            outputs.logprobs,
            outputs.top_logprobs,
            total,
            compiled - started,
            prefilled - compiled,
            decoded - prefilled,
        )

    def _log(self, call: Call, batch: int) -> LogProbs | None:
        """Room for the log-probabilities of a call of `decode_steps`, of as many tokens as most are asked for."""
        asked = [n for n in call.logprobs if n is not None]
        if not asked:
            return None
        n = min(round_up(max(asked)), self.config.vocab_size) if max(asked) else 0
        return LogProbs.empty(self.sizes.stream_every, batch, n)

    def _take_caches(self, needed: list[int]) -> decoder.Caches:
        """The caches kept from the last call if they have the pages that this one needs, else new ones.

        needed: pages for each of the model's windows.
        """
        caches, self._caches = self._caches, None
        have = [0] * len(needed) if caches is None else self._num_pages(caches)
        if caches is not None and all(n >= least for n, least in zip(have, needed)):
            return caches
        caches = None  # freed before others are made
        given = self.sizes.num_pages
        pages = [max(n, round_up(least)) for n, least in zip(have, needed)]
        if given is not None:
            pages = [given, *(min(n, given) for n in pages[1:])]
        return decoder.empty_caches(self.config, pages, self.sizes.page_size, self.kv_dtype)

    def _num_pages(self, caches: decoder.Caches) -> list[int]:
        """Of the caches of each of the model's windows."""
        of_window = {
            layer.window: cache.num_pages for layer, cache in zip(self.config.layers, caches)
        }
        return [of_window[window] for window in self.config.windows]

    def _requests(
        self, call: Call, batch: int, owned: list[list[int]], num_pages: list[int]
    ) -> Requests:
        """What a call's requests are to the device, filled up to `batch` with requests of no tokens.

        owned, num_pages: pages of each request and of the cache, for each of the model's windows.
        """
        cos_sin_caches = self._rope_tables(max(call.lengths))
        max_context = cos_sin_caches[0].shape[0]
        more = batch - len(call.prompts)
        page_size = self.sizes.page_size
        block_tables = tuple(
            allocate_pages(
                [*call.lengths, *[0] * more],
                page_size,
                pages,
                max_pages=-(-max_context // page_size),
                owned=[*own, *[0] * more],
                seed=call.seed,
            )
            for own, pages in zip(owned, num_pages)
        )
        eos = np.full(round_up(max(1, call.eos.size)), -1, np.int32)
        eos[: call.eos.size] = call.eos
        # A request's draws depend on the seed and on its place, not on how many there are.
        places = jnp.arange(batch, dtype=jnp.int32)
        return Requests(
            block_tables=tuple(map(jnp.asarray, block_tables)),
            prompt_len=jnp.asarray([*map(len, call.prompts), *[0] * more], jnp.int32),
            limit=jnp.asarray([*call.limits, *[0] * more], jnp.int32),
            eos=jnp.asarray(eos),
            key=jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(call.seed), places),
            cos_sin_caches=cos_sin_caches,
            draws=_draws(call, more),
        )

    def _rope_tables(self, longest: int) -> tuple[jax.Array, ...]:
        """The tables kept from other calls if they serve contexts up to `longest`, else new ones.

        The frequencies are those of this call's longest context, however many positions the tables have.
        """
        stretched = tuple(rope.is_stretched(longest) for rope in self.config.ropes)
        kept = self._cos_sin_caches.get(stretched)
        if kept is None or kept[0].shape[0] < longest:
            rounded = min(round_up(longest), self.config.max_position_embeddings)
            max_context = self.sizes.max_context or rounded
            kept = decoder.rope_tables(self.config, max_context, longest=longest)
            self._cos_sin_caches[stretched] = kept
        return kept


def round_up(size: int) -> int:
    """The least of 1, 2, 4 .. 64, 80, 96, 112, 128, 160, 192 .. that is at least `size`: sizes that repeat.

    What has such a size wastes at most a quarter, and up to 64 what is small anyway.
    """
    bits = (size - 1).bit_length()
    step = 1 << (bits if size <= 64 else bits - 3)
    return -(-size // step) * step


def _draws(call: Call, more: int) -> Draws | None:
    """How each request draws, and `more` that fill the batch; None where all take the likeliest token."""
    if not call.sampling.draws:
        return None
    columns = zip(*call.draws, *[Draw(0.0, NO_TOP_K, 1.0, 0.0)] * more)
    dtypes = (np.float32, np.int32, np.float32, np.float32)
    return Draws(*(jnp.asarray(np.array(x, dtype)) for x, dtype in zip(columns, dtypes)))


def _taken(state: State, tokens: jax.Array, outputs: Outputs) -> State:
    """The state after the host has read tokens [steps, b]: requests whose text has come to a stop string are done."""
    stopped = outputs.take(np.asarray(tokens), state.logprobs)
    return state._replace(done=state.done | jnp.asarray(stopped)) if stopped.any() else state


def _compile(function: Any, *args: Any, **static: Any) -> Callable[..., Any]:
    """A jit-compiled function for arguments like these, compiled now so that calls can be timed."""
    leaves, tree = jax.tree.flatten(args)
    like = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves)
    return _compile_for(function, tree, tuple(like), tuple(static.items()))


@functools.lru_cache(maxsize=32)
def _compile_for(function: Any, tree: Any, leaves: tuple, static: tuple) -> Callable[..., Any]:
    return function.lower(*jax.tree.unflatten(tree, leaves), **dict(static)).compile()


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens at {tokens / seconds:.1f} tokens/s" if tokens else "0 tokens"
