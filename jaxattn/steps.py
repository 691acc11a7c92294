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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxattn.models import decoder
from jaxattn.models.config import DecoderConfig
from jaxattn.models.weights import Params
from jaxattn.page_table import get_batch_indices_positions
from jaxattn.sampling import sampling_from_logits


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What a step does beside taking the likeliest token: static, since a loop has no business doing it for nobody.

    Attributes:
      draws: some request has a temperature, and `Requests.draws` says how each draws.
      limits: some request that draws has a top_k or a top_p.
    """

    draws: bool = False
    limits: bool = False


class Draws(NamedTuple):
    """How each request draws, as `sampling_from_logits` has it."""

    temperature: Array  # float32 [b]
    top_k: Array  # int32 [b]
    top_p: Array  # float32 [b]
    min_p: Array  # float32 [b]


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
    draws: Draws | None = None  # None: all take the likeliest token


class LogProbs(NamedTuple):
    """Natural logarithms of the model's own probabilities, before temperature and limits.

    Row i is of the i-th step of a call of `decode_steps`; row 0 after prefill of the first new token.
    """

    token: Array  # float32 [num_steps, b], of the token taken
    likeliest: Array  # int32 [num_steps, b, n], tokens in descending order
    values: Array  # float32 [num_steps, b, n], theirs

    @classmethod
    def empty(cls, num_steps: int, batch: int, n: int) -> "LogProbs":
        shape = num_steps, batch, n
        return cls(
            jnp.zeros(shape[:2], jnp.float32),
            jnp.zeros(shape, jnp.int32),
            jnp.zeros(shape, jnp.float32),
        )


class State(NamedTuple):
    """What a step changes; donated."""

    caches: decoder.Caches
    kv_len: Array  # int32 [b], tokens in the caches
    token: Array  # int32 [b], sampled last and not in the caches yet
    generated: Array  # int32 [b], tokens sampled so far
    done: Array  # bool [b]
    logprobs: LogProbs | None = None  # None: not kept


def sample(
    logits: Array,
    keys: Array,
    draws: Draws | None,
    sampling: Sampling,
    *,
    backend: str | None = None,
) -> Array:
    """Takes a token for each request.

    Args:
      logits: float32 [b, vocab].
      keys: random keys [b].
      draws: how each draws; None: takes the likeliest, as sampling must say too.
      sampling: static.
      backend: as `sampling_from_logits`.

    Returns:
      int32 [b]; 0 where no token has a probability.
    """
    if not sampling.draws or draws is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    token = sampling_from_logits(
        logits,
        keys,
        temperature=draws.temperature,
        top_k=draws.top_k if sampling.limits else None,
        top_p=draws.top_p if sampling.limits else None,
        min_p=draws.min_p,
        backend=backend,
    )
    return jnp.maximum(token, 0)


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
    return _accept(state, requests, logits, ends, sampling, backend, step=0)


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
        state = _accept(state, requests, logits, active, sampling, backend, step)
        new = jnp.where(active, state.token, -1)
        # `.at[step].set` would check its index, in a kernel of its own.
        return step + 1, state, jax.lax.dynamic_update_index_in_dim(tokens, new, step, axis=0)

    tokens = jnp.full((num_steps, state.token.shape[0]), -1, jnp.int32)
    _, state, tokens = jax.lax.while_loop(unfinished, one_step, (jnp.int32(0), state, tokens))
    return state, tokens


def _accept(
    state: State,
    requests: Requests,
    logits: Array,
    active: Array,
    sampling: Sampling,
    backend: str | None,
    step: Array | int,
) -> State:
    """Samples the next token of the active requests; one that ends its request marks it done."""
    # The key depends on the request and its token alone, so chunks do not change what is drawn.
    keys = jax.vmap(jax.random.fold_in)(requests.key, state.generated)
    new = sample(logits, keys, requests.draws, sampling, backend=backend)
    token = jnp.where(active, new, state.token)
    generated = state.generated + active.astype(jnp.int32)
    ended = (token[:, None] == requests.eos[None, :]).any(axis=1) | (generated >= requests.limit)
    if state.logprobs is not None:
        kept = _logprobs(logits, token, state.logprobs.values.shape[-1])
        state = state._replace(logprobs=_written(state.logprobs, step, kept, active))
    return state._replace(token=token, generated=generated, done=state.done | active & ended)


def _logprobs(logits: Array, token: Array, n: int) -> LogProbs:
    """Of one step, [b] and [b, n]."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    own = jnp.take_along_axis(logits, token[:, None], axis=-1)
    values, likeliest = jax.lax.top_k(logits, n)
    return LogProbs((own - total)[:, 0], likeliest.astype(jnp.int32), values - total)


def _written(log: LogProbs, step: Array | int, new: LogProbs, active: Array) -> LogProbs:
    """The log with the active requests' row of a step."""

    def write(rows: Array, row: Array) -> Array:
        chosen = active.reshape(-1, *[1] * (row.ndim - 1))
        kept = jax.lax.dynamic_index_in_dim(rows, step, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(rows, jnp.where(chosen, row, kept), step, axis=0)

    return jax.tree.map(write, log, new)
