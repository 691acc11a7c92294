"""What comes out of a call of generation: tokens, their log-probabilities, and texts that stop strings end."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxattn.call import Call
from jaxattn.steps import LogProbs


class _Read(NamedTuple):
    """`LogProbs` on the host."""

    token: np.ndarray
    likeliest: np.ndarray
    values: np.ndarray


class Outputs:
    """Takes what steps leave, as the host reads it.

    Attributes:
      tokens: the new tokens of each request.
      logprobs: of each of these tokens; empty for a request that did not ask.
      top_logprobs: likewise, the likeliest tokens and theirs.
    """

    def __init__(self, call: Call, stream: Callable[[int, list[int]], None] | None):
        self._call, self._stream = call, stream
        count = len(call.prompts)
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.logprobs: list[list[float]] = [[] for _ in range(count)]
        self.top_logprobs: list[list[dict[int, float]]] = [[] for _ in range(count)]

    def take(self, tokens: np.ndarray, log: LogProbs | None) -> np.ndarray:
        """Takes the tokens of some steps.

        Args:
          tokens: int32 [steps, b], -1 for none; b may be more requests than there are.
          log: of these steps, and maybe of more; None: not kept.

        Returns:
          bool [b], the requests that a stop string ended in these steps.
        """
        read = None if log is None else _Read(*map(np.asarray, log))
        stopped = np.zeros(tokens.shape[1], bool)
        for request, column in enumerate(tokens.T[: len(self.tokens)]):
            steps = np.flatnonzero(column >= 0)
            new = column[steps].tolist()
            if not new:
                continue
            kept, stopped[request] = self._until_stop(request, new)
            self.tokens[request] += new[:kept]
            if read is not None:
                self._take_logprobs(request, steps[:kept], read)
            if self._stream:
                self._stream(request, new[:kept])
        return stopped

    def texts(self) -> list[str] | None:
        """The text of each request, without the stop string that ended it; None without a `decode`."""
        decode = self._call.decode
        if decode is None:
            return None
        return [
            text[: first_stop(text, stops)]
            for text, stops in zip(map(decode, self.tokens), self._call.stops)
        ]

    def _until_stop(self, request: int, new: list[int]) -> tuple[int, bool]:
        """How many of the new tokens there are up to the one that completes a stop string, and whether one does."""
        decode, stops = self._call.decode, self._call.stops[request]

        def stops_after(count: int) -> bool:
            # All of the text: a stop string may lie across tokens, and these decode together.
            assert decode is not None  # as check_call sees to
            return first_stop(decode(self.tokens[request] + new[:count]), stops) is not None

        if not stops or not stops_after(len(new)):
            return len(new), False
        return next(count for count in range(1, len(new) + 1) if stops_after(count)), True

    def _take_logprobs(self, request: int, steps: np.ndarray, log: _Read) -> None:
        n = self._call.logprobs[request]
        if n is None:
            return
        self.logprobs[request] += log.token[steps, request].tolist()
        likeliest = log.likeliest[steps, request, :n].tolist()
        values = log.values[steps, request, :n].tolist()
        self.top_logprobs[request] += [dict(zip(*each)) for each in zip(likeliest, values)]


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string of a text begins; None: it has none."""
    return min((at for at in map(text.find, stops) if at >= 0), default=None)


def may_stop(text: str, stops: Sequence[str]) -> int:
    """Where the end of a text begins that may be the beginning of a stop string; its length, if none may."""
    for at in range(max(0, len(text) - max(map(len, stops), default=1) + 1), len(text)):
        if any(stop.startswith(text[at:]) for stop in stops):
            return at
    return len(text)
