"""Text generation: chunked prefill, then a decode loop that stays on the device.

A token's way from prompt to sample:

1. `generate` gives each request its pages for good, in a block table, and allocates the caches.
2. `prefill_step`: the prompts, laid end to end, pass through the model a chunk of fixed size at a
   time, so one compiled program serves any mix of lengths. Where a prompt ends, its first new
   token is sampled.
3. `decode_steps`: one `lax.while_loop` in which each step plans, appends, attends and samples, for
   up to `num_steps` tokens a request. The host then reads these tokens and calls again; between
   two tokens of a call a GPU never waits for it.

`State` is donated to both functions: the caches are updated in place, and memory does not grow with
the number of tokens.

    python -m jaxattn.generate --model DIR --prompt "Once upon a time" --max-new-tokens 64

Axes: b requests, c tokens of a chunk, w pages of a block-table row.
"""

import argparse
import dataclasses
import functools
import math
import operator
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxattn.checks import FLOAT_DTYPES, check_positive
from jaxattn.kv_cache import PageTable, get_batch_indices_positions
from jaxattn.models import llama
from jaxattn.plan import plan_decode, plan_prefill


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
    """What stays the same while b requests run."""

    block_table: Array  # int32 [b, w], the pages of each
    prompt_len: Array  # int32 [b]
    limit: Array  # int32 [b], tokens to generate at most
    eos: Array  # int32 [any], the tokens that end a request
    key: Array  # [b], the random key of each
    cos_sin_cache: Array  # float32 [max_context, head_dim]


class State(NamedTuple):
    """What a step changes; donated."""

    caches: llama.Caches
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
    params: llama.Params,
    state: State,
    requests: Requests,
    tokens: Array,
    begin: Array,
    *,
    config: llama.LlamaConfig,
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
    page_table = PageTable.from_block_table(requests.block_table, kv_len, page_size)
    plan = plan_prefill(
        qo_indptr,
        page_table,
        page_size=page_size,
        num_qo_tokens=capacity,
        num_qo_heads=config.num_qo_heads,
        num_kv_heads=config.num_kv_heads,
    )
    batch = llama.Batch(tokens, positions, batch_indices, page_table, plan)
    logits, caches = llama.prefill(
        params, config, batch, state.caches, requests.cos_sin_cache, backend=backend
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
    params: llama.Params,
    state: State,
    requests: Requests,
    *,
    num_steps: int,
    config: llama.LlamaConfig,
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
        page_table = PageTable.from_block_table(requests.block_table, kv_len, page_size)
        plan = plan_decode(
            page_table,
            page_size=page_size,
            num_qo_heads=config.num_qo_heads,
            num_kv_heads=config.num_kv_heads,
        )
        batch = llama.Batch(
            state.token,
            jnp.where(active, state.kv_len, 0),
            jnp.where(active, requests_in_order, -1),
            page_table,
            plan,
        )
        logits, caches = llama.decode_step(
            params, config, batch, state.caches, requests.cos_sin_cache, backend=backend
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


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes:
      tokens: the new tokens of each request; one that ended by an EOS token ends with it.
      prompt_tokens: tokens of all prompts.
      compile_s: seconds of compilation; not in the next two.
      prefill_s: seconds from the first chunk until every prompt had its first new token.
      decode_s: seconds for all further tokens.
    """

    tokens: list[list[int]]
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


def generate(
    params: llama.Params,
    config: llama.LlamaConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_ids: Sequence[int] = (),
    page_size: int = 16,
    num_pages: int | None = None,
    prefill_chunk: int = 2048,
    stream_every: int = 32,
    stream: Callable[[int, list[int]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    backend: str | None = None,
) -> Generation:
    """Continues prompts, all in one batch.

    Args:
      params, config: from `llama.load`; the caches get the weights' dtype.
      prompts: token ids of each request, of any lengths, none empty.
      max_new_tokens: for all requests, or of each.
      temperature: 0 takes the likeliest token; otherwise logits are divided by it.
      top_p: in (0, 1]; draws among the likeliest tokens, as few as hold this much probability, and their ties.
      seed: of the draws; the same seed gives the same tokens.
      eos_token_ids: tokens that end a request, `config.eos_token_ids` say.
      page_size: tokens a page.
      num_pages: pages of the cache; default: as many as the requests need.
      prefill_chunk: prompt tokens that pass through the model at once, at most.
      stream_every: decode steps between the host's looks at the tokens. A GPU takes all of them, also
        where every request ends before the last.
      stream: called with (request, its latest tokens) as they come.
      progress: called with (prompt tokens done, prompt tokens in all) after each chunk.
      backend: "triton", "xla", "interpret" or None, for every op.

    Raises:
      ValueError: prompts or options out of range; more pages needed than the cache holds.
      NotImplementedError: a context longer than the model's sliding window.
    """
    sampling = Sampling(temperature, top_p)
    check_positive(page_size=page_size, prefill_chunk=prefill_chunk, stream_every=stream_every)
    limits = _check_requests(prompts, max_new_tokens, config.vocab_size)
    prompt_len = [len(prompt) for prompt in prompts]
    max_len = list(map(operator.add, prompt_len, limits))
    block_table, num_pages = allocate_pages(max_len, page_size, num_pages, seed)
    batch = len(prompts)

    requests = Requests(
        block_table=jnp.asarray(block_table),
        prompt_len=jnp.asarray(prompt_len, jnp.int32),
        limit=jnp.asarray(limits, jnp.int32),
        eos=jnp.asarray(eos_token_ids, jnp.int32),
        key=jax.random.split(jax.random.key(seed), batch),
        cos_sin_cache=llama.rope_table(config, max(max_len)),
    )
    state = State(
        caches=llama.empty_caches(config, num_pages, page_size, params.embed_tokens.dtype),
        kv_len=jnp.zeros(batch, jnp.int32),
        token=jnp.zeros(batch, jnp.int32),
        generated=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
    )

    # Prompts end to end, cut into chunks; short ones do not pay for a long chunk.
    total = sum(prompt_len)
    chunk = min(prefill_chunk, 1 << (total - 1).bit_length())
    laid_out = np.zeros(-(-total // chunk) * chunk, np.int32)
    laid_out[:total] = np.concatenate([np.asarray(prompt) for prompt in prompts])

    options: dict[str, Any] = dict(config=config, sampling=sampling, backend=backend)
    started = time.perf_counter()
    first = (params, state, requests, jnp.zeros(chunk, jnp.int32), jnp.int32(0))
    run_prefill = _compile(prefill_step, *first, **options)
    run_decode = _compile(decode_steps, params, state, requests, num_steps=stream_every, **options)
    compiled = time.perf_counter()

    for begin in range(0, total, chunk):
        tokens = jnp.asarray(laid_out[begin : begin + chunk])
        state = run_prefill(params, state, requests, tokens, jnp.int32(begin))
        if progress:
            state.token.block_until_ready()
            progress(min(begin + chunk, total), total)
    outputs: list[list[int]] = [[] for _ in prompts]
    _collect(outputs, np.asarray(state.token)[None, :], stream)
    prefilled = time.perf_counter()

    while not np.asarray(state.done).all():
        state, tokens = run_decode(params, state, requests)
        _collect(outputs, np.asarray(tokens), stream)
    decoded = time.perf_counter()

    return Generation(outputs, total, compiled - started, prefilled - compiled, decoded - prefilled)


def allocate_pages(
    lengths: Sequence[int], page_size: int, num_pages: int | None, seed: int = 0
) -> tuple[np.ndarray, int]:
    """Pages for requests of up to `lengths` tokens, in permuted order.

    Returns:
      (block table int32 [b, w] whose unused entries are -1, number of pages of the cache).

    Raises:
      ValueError: the requests need more than `num_pages`.
    """
    counts = [-(-length // page_size) for length in lengths]
    needed = sum(counts)
    num_pages = needed if num_pages is None else num_pages
    if needed > num_pages:
        raise ValueError(
            f"{len(counts)} requests need {needed} pages of {page_size} tokens for their prompts "
            f"and new tokens; the cache has {num_pages=}: raise it, or ask for fewer tokens"
        )
    pages = np.random.default_rng(seed).permutation(num_pages)
    table = np.full((len(counts), max(counts)), -1, np.int32)
    for row, count, end in zip(table, counts, np.cumsum(counts), strict=True):
        row[:count] = pages[end - count : end]
    return table, num_pages


def _check_requests(
    prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int], vocab_size: int
) -> list[int]:
    """The new tokens that each request may have; raises ValueError, with the reason."""
    if not prompts:
        raise ValueError("prompts must hold at least one request; got none")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"a prompt must have at least one token; prompt {i} has none")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(
                f"token ids must be in [0, {vocab_size=}); prompt {i} has "
                f"{min(prompt)} .. {max(prompt)}"
            )
    if isinstance(max_new_tokens, int | np.integer):
        max_new_tokens = [int(max_new_tokens)] * len(prompts)
    if len(max_new_tokens) != len(prompts):
        raise ValueError(
            f"max_new_tokens must be one number, or one for each of {len(prompts)} prompts; "
            f"got {len(max_new_tokens)}"
        )
    for limit in max_new_tokens:
        check_positive(max_new_tokens=limit)
    return list(max_new_tokens)


def _collect(
    outputs: list[list[int]], tokens: np.ndarray, stream: Callable[[int, list[int]], None] | None
) -> None:
    """Appends tokens [steps, b], -1 for none, to each request's."""
    for request, column in enumerate(tokens.T):
        new = column[column >= 0].tolist()
        outputs[request].extend(new)
        if stream and new:
            stream(request, new)


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


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m jaxattn.generate`: the exit status."""
    args = _parser().parse_args(argv)
    try:
        _run(args)
    except (ImportError, NotImplementedError, OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxattn.generate",
        description="Continues prompts with a Llama, Mistral, Qwen2 or Qwen3 model.",
    )
    add = parser.add_argument
    add("--model", required=True, help="folder with config.json and safetensors")
    add("--prompt", action="append", default=[], help="text; may be given several times")
    add("--batch", help="file with a prompt on each line")
    add("--max-new-tokens", type=int, default=128, help="for each prompt (%(default)s)")
    add("--temperature", type=float, default=0.0, help="0: the likeliest token (%(default)s)")
    add("--top-p", type=float, default=1.0, help="nucleus to draw from (%(default)s)")
    add("--seed", type=int, default=0, help="of the draws (%(default)s)")
    add("--page-size", type=int, default=16, help="tokens a page (%(default)s)")
    add("--num-pages", type=int, help="pages of the cache (as many as needed)")
    add("--prefill-chunk", type=int, default=2048, help="prompt tokens at once (%(default)s)")
    add("--dtype", choices=FLOAT_DTYPES, help="of weights and cache (the checkpoint's)")
    return parser


def _run(args: argparse.Namespace) -> None:
    prompts = list(args.prompt)
    if args.batch:
        prompts += [line for line in Path(args.batch).read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError("nothing to continue: give --prompt TEXT or --batch FILE")
    config, params = llama.load(args.model, args.dtype, progress=_progress("loading", "weights"))
    encode, decode = _tokenizer(Path(args.model))
    out = _StreamedText(decode) if len(prompts) == 1 else None
    generation = generate(
        params,
        config,
        [encode(prompt) for prompt in prompts],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        eos_token_ids=config.eos_token_ids,
        page_size=args.page_size,
        num_pages=args.num_pages,
        prefill_chunk=args.prefill_chunk,
        stream=out,
        progress=_progress("prefill", "tokens"),
    )
    if out:
        out.finish()
    else:
        for i, tokens in enumerate(generation.tokens):
            print(f"[{i}] {decode(tokens)}")
    print(generation.summary(), file=sys.stderr)


def _tokenizer(
    folder: Path,
) -> tuple[Callable[[str], list[int]], Callable[[Sequence[int]], str]]:
    """(encode, decode) of tokenizer.json; without one, text is token ids with spaces between."""
    path = folder / "tokenizer.json"
    if path.exists():
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                "reading tokenizer.json needs tokenizers: pip install 'jaxattn[models]'"
            ) from error
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing more specific
            raise ValueError(
                f"{str(path)!r} must be a tokenizer; it does not load: {error}"
            ) from error
        return (lambda text: tokenizer.encode(text).ids), tokenizer.decode

    def encode(text: str) -> list[int]:
        try:
            return [int(token) for token in text.split()]
        except ValueError:
            raise ValueError(
                f"tokenizer.json is missing in {str(folder)!r}, so a prompt must be token ids, "
                f"'1 15 27' say; got {text!r}"
            ) from None

    return encode, lambda tokens: " ".join(map(str, tokens))


class _StreamedText:
    """Prints one request's text as its tokens come."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self.decode = decode
        self.tokens: list[int] = []
        self.printed = 0

    def __call__(self, request: int, tokens: list[int]) -> None:
        self.tokens += tokens
        # A character whose last bytes are yet to come decodes as U+FFFD: hold it back.
        self._print(self.decode(self.tokens).rstrip("\ufffd"), end="")

    def finish(self) -> None:
        self._print(self.decode(self.tokens), end="\n")

    def _print(self, text: str, end: str) -> None:
        print(text[self.printed :], end=end, flush=True)
        self.printed = max(self.printed, len(text))


def _progress(what: str, unit: str) -> Callable[[int, int], None]:
    """Rewrites one line on stderr."""

    def report(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{what}: {done}/{total} {unit}", end=end, file=sys.stderr, flush=True)

    return report


if __name__ == "__main__":
    sys.exit(main())
