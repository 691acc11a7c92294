"""What a call of generation asks for, checked on the host before anything is read, allocated or compiled."""

import dataclasses
import math
import reprlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxattn.checks import check_positive
from jaxattn.models.config import DecoderConfig
from jaxattn.models.decoder import check_context
from jaxattn.page_rings import pages_of
from jaxattn.sampling import MOST_TEMPERATURE
from jaxattn.steps import Sampling

Stop = str | Sequence[str] | None  # strings that end a request
NO_TOP_K = 2**31 - 1  # more than any vocabulary


class Draw(NamedTuple):
    """How one request draws."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes that a `Generator` works with.

    What is None is what the calls so far have needed, rounded up to a size that repeats (at most a quarter more, or the
    next power of two up to 64).

    Attributes:
      page_size: tokens a page.
      num_pages: pages of the cache of a layer. Where layers see different windows, the widest ones' have so many, and
        the others' as many as the calls so far have needed, rounded up, and not more than these.
      max_context: tokens of a request at most, prompt and new ones.
      prefill_chunk: prompt tokens that pass through the model at once, at most.
      stream_every: decode steps between the host's looks at the tokens. A GPU takes all of them, also
        where every request ends before the last.

    Raises:
      ValueError: a size is not a positive integer.
    """

    page_size: int = 16
    num_pages: int | None = None
    max_context: int | None = None
    prefill_chunk: int = 2048
    stream_every: int = 32

    def __post_init__(self) -> None:
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        check_positive(**given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """How tokens are chosen, where a request ends, and what is told of it: as `jaxattn.generate.generate` says."""

    temperature: float | Sequence[float] = 0.0
    top_k: int | None | Sequence[int | None] = None
    top_p: float | Sequence[float] = 1.0
    min_p: float | Sequence[float] = 0.0
    stop: Stop | Sequence[Stop] = None
    logprobs: int | None | Sequence[int | None] = None
    seed: int = 0
    eos_token_ids: int | Sequence[int] | None = None
    decode: Callable[[Sequence[int]], str] | None = None


class Call(NamedTuple):
    """What one call asks for, checked."""

    prompts: list[np.ndarray]  # int32 [tokens] of each request
    limits: list[int]  # new tokens of each at most
    draws: list[Draw]  # how each draws
    stops: list[list[str]]  # the strings that end each
    decode: Callable[[Sequence[int]], str] | None
    logprobs: list[int | None]  # of each
    eos: np.ndarray  # int32 [any]
    seed: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each request at most, prompt and new ones."""
        return [len(prompt) + limit for prompt, limit in zip(self.prompts, self.limits)]

    @property
    def sampling(self) -> Sampling:
        """What the steps of this call have to do."""
        drawing = [draw for draw in self.draws if draw.temperature > 0]
        limited = any(draw.top_k < NO_TOP_K or draw.top_p < 1 for draw in drawing)
        return Sampling(draws=bool(drawing), limits=limited)


def check_call(
    config: DecoderConfig,
    sizes: Sizes,
    prompts: Sequence[Sequence[int]] | np.ndarray,
    *,
    max_new_tokens: int | Sequence[int],
    choices: Choices,
) -> Call:
    """What `Generator.generate` is asked for; takes no weights.

    Raises:
      TypeError: prompts or EOS tokens that are not token ids.
      ValueError: prompts or options out of range; a request that does not fit the model, the context or the cache.
    """
    seed = choices.seed
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or int(seed) < 0:
        raise ValueError(f"seed must be an integer, at least 0; got {seed!r}")
    ids = _prompts(prompts, config.vocab_size)
    limits = _each("max_new_tokens", max_new_tokens, len(ids))
    for limit in limits:
        check_positive(max_new_tokens=limit)
    stops = _stops(choices.stop, len(ids))
    if any(stops) and choices.decode is None:
        raise ValueError(
            "stop strings need decode=, a function from token ids to their text: tokenizer.decode, say"
        )
    eos = choices.eos_token_ids
    call = Call(
        ids,
        list(map(int, limits)),
        _draws(choices, len(ids)),
        stops,
        choices.decode,
        _logprobs(choices.logprobs, len(ids), config.vocab_size),
        _token_ids("eos_token_ids", np.atleast_1d([] if eos is None else eos), config.vocab_size),
        int(seed),
    )
    _check_room(config, sizes, call)
    return call


def pages_needed(config: DecoderConfig, sizes: Sizes, call: Call) -> list[list[int]]:
    """Pages that each request owns, for each of `config.windows`; the widest are first and need most."""
    return [
        [
            pages_of(length, sizes.page_size, window, min(len(prompt), sizes.prefill_chunk))
            for prompt, length in zip(call.prompts, call.lengths)
        ]
        for window in config.windows
    ]


def _each(name: str, given: Any, count: int) -> list[Any]:
    """What is given for all requests, or of each, of each."""
    if isinstance(given, np.generic | np.ndarray | jax.Array):
        given = given.tolist()
    if np.ndim(given) == 0:
        return [given] * count
    if len(given) != count:
        raise ValueError(
            f"{name} must be one number, or one for each of {count} prompts; got {len(given)}"
        )
    return list(given)


def _draws(choices: Choices, count: int) -> list[Draw]:
    each = (
        _each(name, getattr(choices, name), count)
        for name in ("temperature", "top_k", "top_p", "min_p")
    )
    draws = []
    for temperature, top_k, top_p, min_p in zip(*each):
        if not (_is_number(temperature) and 0 <= temperature < math.inf):
            raise ValueError(f"temperature must be 0 or positive; got {temperature!r}")
        if top_k is not None:
            check_positive(top_k=top_k)
        if not (_is_number(top_p) and 0 < top_p <= 1):
            raise ValueError(f"top_p must be in (0, 1]; got {top_p!r}")
        if not (_is_number(min_p) and 0 <= min_p <= 1):
            raise ValueError(f"min_p must be in [0, 1]; got {min_p!r}")
        most = NO_TOP_K if top_k is None else min(int(top_k), NO_TOP_K)
        warm = min(float(temperature), MOST_TEMPERATURE)
        draws.append(Draw(warm, most, float(top_p), float(min_p)))
    return draws


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float | np.number) and not isinstance(x, bool)


def _stops(stop: Any, count: int) -> list[list[str]]:
    """The stop strings of each request."""

    def strings(given: Any) -> list[str]:
        several = [given] if isinstance(given, str) else [] if given is None else given
        # What is read but once, a generator say, would be empty the second time.
        if not isinstance(several, Collection) or not all(
            isinstance(one, str) and one for one in several
        ):
            raise ValueError(
                "stop must be strings that are not empty: one or several for all requests, or a sequence of such of "
                f"each request; got {reprlib.repr(stop)}"
            )
        return list(several)

    if not isinstance(stop, Collection) or all(isinstance(one, str) for one in stop):
        return [strings(stop)] * count
    if len(stop) != count:
        raise ValueError(
            f"stop must be strings for all requests, or of each of {count} prompts; got {len(stop)}"
        )
    return [strings(own) for own in stop]


def _logprobs(logprobs: Any, count: int, vocab_size: int) -> list[int | None]:
    each = _each("logprobs", logprobs, count)
    for n in each:
        whole = n is None or (hasattr(n, "__index__") and not isinstance(n, bool))
        if not (whole and (n is None or 0 <= int(n) <= vocab_size)):
            raise ValueError(
                f"logprobs must be None or an integer from 0 to {vocab_size=}, how many of the likeliest tokens are "
                f"told too; got {n!r}"
            )
    return [None if n is None else int(n) for n in each]


def _prompts(prompts: Any, vocab_size: int) -> list[np.ndarray]:
    must = (
        "prompts must hold the token ids of each request, [[1, 15, 27], [1, 9]] say: a sequence of "
        "integers for each, or a 2-D integer array"
    )
    if isinstance(prompts, str | bytes) or not hasattr(prompts, "__len__"):
        raise TypeError(f"{must}; got {reprlib.repr(prompts)}")
    if not len(prompts):
        raise ValueError("prompts must hold at least one request; got none")
    ids = []
    for i, prompt in enumerate(prompts):
        try:
            array = np.asarray(prompt)
        except ValueError:  # a ragged list of lists
            array = np.asarray(None)
        if array.ndim != 1:
            raise TypeError(f"{must}; prompt {i} is {reprlib.repr(prompt)}")
        if not array.size:
            raise ValueError(f"a prompt must have at least one token; prompt {i} has none")
        ids.append(_token_ids(f"prompt {i}", array, vocab_size))
    return ids


def _token_ids(name: str, ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """int32 [any]; nothing is truncated."""
    if not ids.size:
        return np.zeros(0, np.int32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise TypeError(
            f"token ids must be integers; {name} holds {ids.dtype}: {reprlib.repr(ids.tolist())}"
        )
    if not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(
            f"token ids must be in [0, {vocab_size=}); {name} has {ids.min()} .. {ids.max()}"
        )
    return ids.astype(np.int32)


def _check_room(config: DecoderConfig, sizes: Sizes, call: Call) -> None:
    lengths = call.lengths
    check_context(config, max(lengths))
    if sizes.max_context is not None and max(lengths) > sizes.max_context:
        raise ValueError(
            f"a request of {max(lengths)} tokens, prompt and new ones, exceeds "
            f"max_context={sizes.max_context}: raise it, or ask for fewer tokens"
        )
    needed = sum(pages_needed(config, sizes, call)[0])
    if sizes.num_pages is not None and needed > sizes.num_pages:
        raise ValueError(
            f"{len(lengths)} requests need {needed} pages of {sizes.page_size} tokens for their "
            f"prompts and new tokens; the cache has num_pages={sizes.num_pages}: raise it, or ask "
            "for fewer tokens"
        )
