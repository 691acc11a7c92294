"""What a call of generation asks for, checked on the host before anything is read, allocated or compiled."""

import dataclasses
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxattn.checks import check_positive
from jaxattn.models.config import DecoderConfig
from jaxattn.models.decoder import check_context
from jaxattn.page_rings import pages_of
from jaxattn.steps import Sampling


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


class Call(NamedTuple):
    """What one call asks for, checked."""

    prompts: list[np.ndarray]  # int32 [tokens] of each request
    limits: list[int]  # new tokens of each at most
    sampling: Sampling
    eos: np.ndarray  # int32 [any]
    seed: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each request at most, prompt and new ones."""
        return [len(prompt) + limit for prompt, limit in zip(self.prompts, self.limits)]


def check_call(
    config: DecoderConfig,
    sizes: Sizes,
    prompts: Sequence[Sequence[int]] | np.ndarray,
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_ids: int | Sequence[int] | None = None,
) -> Call:
    """What `Generator.generate` is asked for; takes no weights.

    Raises:
      TypeError: prompts or EOS tokens that are not token ids.
      ValueError: prompts or options out of range; a request that does not fit the model, the context or the cache.
    """
    sampling = Sampling(temperature, top_p)
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or int(seed) < 0:
        raise ValueError(f"seed must be an integer, at least 0; got {seed!r}")
    ids = _prompts(prompts, config.vocab_size)
    given: Any = max_new_tokens
    limits = [given] * len(ids) if np.ndim(given) == 0 else list(given)
    if len(limits) != len(ids):
        raise ValueError(
            f"max_new_tokens must be one number, or one for each of {len(ids)} prompts; "
            f"got {len(limits)}"
        )
    for limit in limits:
        check_positive(max_new_tokens=limit)
    ends = np.atleast_1d([] if eos_token_ids is None else eos_token_ids)
    eos = _token_ids("eos_token_ids", ends, config.vocab_size)
    call = Call(ids, list(map(int, limits)), sampling, eos, int(seed))
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
