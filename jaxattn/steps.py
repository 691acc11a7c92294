"""What runs on the device while text is generated: a chunk of prefill, steps of decoding, a draw.

1. `prefill_step`: the prompts, laid end to end, pass through the model a chunk of fixed size at a
   time, so one compiled program serves any mix of lengths. Where a prompt ends, its first new
   token is sampled.
2. `decode_steps`: one `lax.while_loop` in which each step plans, appends, attends and samples, for
   up to `num_steps` tokens a request. The host then reads these tokens and calls again; between
   two tokens of a call a GPU never waits for it.

`State` is donated to both functions: the caches are updated in place, and memory does not grow with
the number of tokens.

Layers that see a window have block tables of their own, whose rows repeat: see `jaxattn.page_rings`.

Axes: b requests, c tokens of a chunk, w pages of a block-table row.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxattn.kv_cache import get_batch_indices_positions
from jaxattn.models import decoder
from jaxattn.models.config import DecoderConfig
from jaxattn.models.weights import Params


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn: static, since a greedy loop has no business sorting a vocabulary.

    Attributes:
      temperature: 0 takes the likeliest token; otherwise logits are divided by it.
      top_p: in (0, 1]; draws among the likeliest tokens, as few as hold this much probability, and their ties.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or positive; got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1]; got {self.top_p}")


class Requests(NamedTuple):
    """What stays the same while b requests run; one that is there to fill the batch has no prompt and no limit."""

    block_tables: tuple[
        Array, ...
    ]  # int32 [b, w], the pages of each, for each of the model's windows
    prompt_len: Array  # int32 [b]
    limit: Array  # int32 [b], tokens to generate at most
    eos: Array  # int32 [any], the tokens that end a request; -1 for none
    key: Array  # [b], the random key of each
    cos_sin_caches: tuple[Array, ...]  # float32 [max_context, rotary_dim], from `rope_tables`


class State(NamedTuple):
    """What a step changes; donated."""

    caches: decoder.Caches
    kv_len: Array  # int32 [b], tokens in the caches
    token: Array  # int32 [b], sampled last and not in the caches yet
    generated: Array  # int32 [b], tokens sampled so far
    done: Array  # bool [b]


def sample(logits: Array, keys: Array, sampling: Sampling) -> Array:
    """Draws a token for each request.

    Args:
      logits: float32 [b, vocab].
      keys: random keys [b].
      sampling: static.

    Returns:
      int32 [b].
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_p < 1:
        likeliest = -jnp.sort(-logits, axis=-1)
        probability = jax.nn.softmax(likeliest, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        # The least of the logits that are needed to reach top_p; the first always is.
        kept = jnp.where(before < sampling.top_p, likeliest, jnp.inf)
        logits = jnp.where(logits < kept.min(axis=-1, keepdims=True), -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


@functools.partial(
    jax.jit, static_argnames=("config", "sampling", "backend"), donate_argnames="state"
)
def prefill_step(
    params: Params,
    state: State,
    requests: Requests,
    tokens: Array,
    begin: Array,
    *,
    config: DecoderConfig,
    sampling: Sampling,
    backend: str | None,
) -> State:
    """Passes tokens `begin .. begin + c` of all prompts, laid end to end, through the model.

    Args:
      tokens: int32 [c]; what lies past the last prompt's end is ignored.
      begin: int32 scalar.
    """
    capacity, page_size = tokens.shape[0], state.caches[0].page_size
    prompt_indptr = jnp.pad(jnp.cumsum(requests.prompt_len, dtype=jnp.int32), (1, 0))
    qo_indptr = jnp.clip(prompt_indptr - begin, 0, capacity)
    kv_len = jnp.clip(begin + capacity - prompt_indptr[:-1], 0, requests.prompt_len)
    batch_indices, positions = get_batch_indices_positions(qo_indptr, kv_len, capacity)
    batch = decoder.make_batch(
        config,
        tokens,
        positions,
        batch_indices,
        requests.block_tables,
        kv_len,
        page_size=page_size,
        qo_indptr=qo_indptr,
    )
    logits, caches = decoder.prefill(
        params, config, batch, state.caches, requests.cos_sin_caches, backend=backend
    )
    ends = (state.kv_len < requests.prompt_len) & (kv_len == requests.prompt_len)
    state = state._replace(caches=caches, kv_len=kv_len)
    return _accept(state, requests, logits, ends, sampling)


@functools.partial(
    jax.jit,
    static_argnames=("num_steps", "config", "sampling", "backend"),
    donate_argnames="state",
)
def decode_steps(
    params: Params,
    state: State,
    requests: Requests,
    *,
    num_steps: int,
    config: DecoderConfig,
    sampling: Sampling,
    backend: str | None,
) -> tuple[State, Array]:
    """Generates up to `num_steps` tokens for each request that is not done.

    On a GPU all steps run, those after the last request was done for nothing.

    Returns:
      (state, tokens int32 [num_steps, b]); tokens are -1 where a request was done before that step.
    """
    page_size = state.caches[0].page_size
    requests_in_order = jnp.arange(state.token.shape[0], dtype=jnp.int32)

    def unfinished(carry: tuple[Array, State, Array]) -> Array:
        step, state, _ = carry
        # A GPU hands each loop predicate to the host and waits, unless XLA can count the steps when
        # it compiles. Elsewhere a look at `done` costs nothing, and a step does.
        over = jax.lax.platform_dependent(
            state.done, cuda=lambda done: jnp.bool_(False), default=jnp.all
        )
        return (step < num_steps) & ~over

    def one_step(carry: tuple[Array, State, Array]) -> tuple[Array, State, Array]:
        step, state, tokens = carry
        active = ~state.done
        # To the model a finished request is an empty one: nothing to append, no keys to read.
        kv_len = jnp.where(active, state.kv_len + 1, 0)
        batch = decoder.make_batch(
            config,
            state.token,
            jnp.where(active, state.kv_len, 0),
            jnp.where(active, requests_in_order, -1),
            requests.block_tables,
            kv_len,
            page_size=page_size,
        )
        logits, caches = decoder.decode_step(
            params, config, batch, state.caches, requests.cos_sin_caches, backend=backend
        )
        state = state._replace(caches=caches, kv_len=jnp.where(active, kv_len, state.kv_len))
        state = _accept(state, requests, logits, active, sampling)
        new = jnp.where(active, state.token, -1)
        # `.at[step].set` would check its index, in a kernel of its own.
        return step + 1, state, jax.lax.dynamic_update_index_in_dim(tokens, new, step, axis=0)

    tokens = jnp.full((num_steps, state.token.shape[0]), -1, jnp.int32)
    _, state, tokens = jax.lax.while_loop(unfinished, one_step, (jnp.int32(0), state, tokens))
    return state, tokens


def _accept(
    state: State, requests: Requests, logits: Array, active: Array, sampling: Sampling
) -> State:
    """Samples the next token of the active requests; one that ends its request marks it done."""
    # The key depends on the request and its token alone, so chunks do not change what is drawn.
    keys = jax.vmap(jax.random.fold_in)(requests.key, state.generated)
    token = jnp.where(active, sample(logits, keys, sampling), state.token)
    generated = state.generated + active.astype(jnp.int32)
    ended = (token[:, None] == requests.eos[None, :]).any(axis=1) | (generated >= requests.limit)
    return state._replace(token=token, generated=generated, done=state.done | active & ended)
