"""Text generation: chunked prefill, then a decode loop that stays on the device.

`generate` continues prompts once; a `Generator` keeps its cache for the next call. What runs on the device is in
`jaxattn.steps`, what the host does in `jaxattn.generator`. The command reads a checkpoint and continues text:

    python -m jaxattn.generate --model DIR --prompt "Once upon a time" --max-new-tokens 64
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from jaxattn.call import Choices, Stop, check_call
from jaxattn.call import Sizes as Sizes
from jaxattn.checks import FLOAT_DTYPES
from jaxattn.generator import Generation as Generation
from jaxattn.generator import Generator as Generator
from jaxattn.kv_scales import FP8_DTYPES
from jaxattn.models.config import DecoderConfig
from jaxattn.models.families import FAMILIES
from jaxattn.models.weights import Params, load, read_config
from jaxattn.outputs import first_stop, may_stop
from jaxattn.steps import Requests as Requests
from jaxattn.steps import Sampling as Sampling
from jaxattn.steps import State as State
from jaxattn.steps import decode_steps as decode_steps


def generate(
    params: Params,
    config: DecoderConfig,
    prompts: Sequence[Sequence[int]] | np.ndarray,
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float | Sequence[float] = 0.0,
    top_k: int | None | Sequence[int | None] = None,
    top_p: float | Sequence[float] = 1.0,
    min_p: float | Sequence[float] = 0.0,
    stop: Stop | Sequence[Stop] = None,
    logprobs: int | None | Sequence[int | None] = None,
    seed: int = 0,
    eos_token_ids: int | Sequence[int] | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
    page_size: int = 16,
    num_pages: int | None = None,
    max_context: int | None = None,
    prefill_chunk: int = 2048,
    stream_every: int = 32,
    stream: Callable[[int, list[int]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    kv_dtype: DTypeLike | None = None,
    backend: str | None = None,
) -> Generation:
    """Continues prompts, all in one batch, with a `Generator` of its own.

    The cache lives as long as the call; make a `Generator` to keep it. Compiled programs are kept: calls of like size
    share them, since what is not given is rounded up to a size that repeats (see `Sizes`).

    Args:
      params, config: from `load`.
      prompts: token ids of each request: sequences of integers of any lengths, none empty, or a 2-D integer array.
      max_new_tokens: for all requests, or of each; so are the next four, and logprobs.
      temperature: 0 takes the likeliest token, the first of equals; otherwise logits are divided by it.
      top_k: draws among so many likeliest tokens, and their ties; None: among all.
      top_p: in (0, 1]; draws among the likeliest tokens, as few as hold this share of the probability that top_k
        leaves, and their ties.
      min_p: in [0, 1]; draws among the tokens of at least min_p times the likeliest one's probability.
      stop: strings that end a request: one or several for all, or of each request a string, several or None. They are
        looked for in the text of its new tokens, also across tokens. `Generation.texts` end before the string;
        `Generation.tokens` end with the token that completes it.
      logprobs: how many of the likeliest tokens have their log-probabilities returned, beside the token taken; 0: that
        one's alone; None: none.
      seed: of the draws, at least 0; the same seed gives the same tokens. A request's draws depend on the seed and on
        its place in the batch, not on the other requests.
      eos_token_ids: tokens that end a request, or one: `config.eos_token_ids` say. The token is part of the result.
      decode: the text of token ids, `tokenizer.decode` say; stop strings need it, and `Generation.texts`.
      page_size: tokens a page.
      num_pages: pages of the cache; default: as many as the requests need, rounded up.
      max_context: tokens of a request at most, prompt and new ones; default: as many as the longest needs, rounded up.
      prefill_chunk: prompt tokens that pass through the model at once, at most.
      stream_every: decode steps between the host's looks at the tokens. A GPU takes all of them, also
        where every request ends before the last, and what follows a stop string is dropped.
      stream: called with (request, its latest tokens) as they come.
      progress: called with (prompt tokens done, prompt tokens in all) after each chunk.
      kv_dtype: of the cache: None for the weights'; "fp8" or a float8 dtype, as for a `Generator`.
      backend: "triton", "xla", "interpret" or None, for every op.

    Raises:
      TypeError: prompts that are not token ids.
      ValueError: prompts or options out of range; more pages needed than the cache holds.
    """
    sizes = Sizes(page_size, num_pages, max_context, prefill_chunk, stream_every)
    return Generator(params, config, sizes, kv_dtype=kv_dtype, backend=backend).generate(
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop=stop,
        logprobs=logprobs,
        seed=seed,
        eos_token_ids=eos_token_ids,
        decode=decode,
        stream=stream,
        progress=progress,
    )


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
        description=f"Continues prompts with a model of type {', '.join(FAMILIES)}.",
    )
    add = parser.add_argument
    add("--model", required=True, help="folder with config.json and safetensors")
    add("--prompt", action="append", default=[], help="text; may be given several times")
    add("--batch", help="file with a prompt on each line")
    add("--max-new-tokens", type=int, default=128, help="for each prompt (%(default)s)")
    add("--temperature", type=float, default=0.0, help="0: the likeliest token (%(default)s)")
    add("--top-k", type=int, help="so many likeliest tokens to draw from (all)")
    add("--top-p", type=float, default=1.0, help="nucleus to draw from (%(default)s)")
    add(
        "--min-p",
        type=float,
        default=0.0,
        help="least share of the largest probability (%(default)s)",
    )
    add(
        "--stop",
        action="append",
        default=[],
        help="text that ends a request; may be given several times",
    )
    add("--seed", type=int, default=0, help="of the draws (%(default)s)")
    add("--page-size", type=int, default=16, help="tokens a page (%(default)s)")
    add("--num-pages", type=int, help="pages of the cache (as many as needed)")
    add("--prefill-chunk", type=int, default=2048, help="prompt tokens at once (%(default)s)")
    add("--dtype", choices=FLOAT_DTYPES, help="of weights and cache (the checkpoint's)")
    add("--kv-dtype", choices=("fp8", *FP8_DTYPES), help="of the cache (that of the weights)")
    return parser


def _run(args: argparse.Namespace) -> None:
    prompts = list(args.prompt)
    if args.batch:
        prompts += [line for line in Path(args.batch).read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError("nothing to continue: give --prompt TEXT or --batch FILE")
    sizes = Sizes(args.page_size, args.num_pages, prefill_chunk=args.prefill_chunk)
    config = read_config(args.model)
    encode, decode = _tokenizer(Path(args.model))
    ids = [encode(prompt) for prompt in prompts]
    options: dict[str, Any] = dict(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        stop=args.stop,
        seed=args.seed,
        eos_token_ids=config.eos_token_ids,
        decode=decode,
    )
    # Weights take a minute to read, these a second.
    check_call(config, sizes, ids, max_new_tokens=args.max_new_tokens, choices=Choices(**options))
    config, params = load(args.model, args.dtype, progress=_progress("loading", "weights"))
    out = _StreamedText(decode, args.stop) if len(prompts) == 1 else None
    generation = Generator(params, config, sizes, kv_dtype=args.kv_dtype).generate(
        ids,
        max_new_tokens=args.max_new_tokens,
        **options,
        stream=out,
        progress=_progress("prefill", "tokens"),
    )
    if out:
        out.finish()
    else:
        for i, text in enumerate(generation.texts or []):
            print(f"[{i}] {text}")
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

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]):
        self.decode, self.stops = decode, stops
        self.tokens: list[int] = []
        self.printed = 0

    def __call__(self, request: int, tokens: list[int]) -> None:
        self.tokens += tokens
        # Held back: a character whose last bytes are yet to come, which decodes as U+FFFD, and what may become a stop
        # string.
        text = self.decode(self.tokens).rstrip("\ufffd")
        self._print(text[: may_stop(text, self.stops)], end="")

    def finish(self) -> None:
        self._print(self.decode(self.tokens), end="\n")

    def _print(self, text: str, end: str) -> None:
        text = text[: first_stop(text, self.stops)]
        print(text[self.printed :], end=end, flush=True)
        self.printed = max(self.printed, len(text))


def _progress(what: str, unit: str) -> Callable[[int, int], None]:
    """Rewrites one line on stderr; where that is not a terminal, says only that all is done."""
    terminal = sys.stderr.isatty()

    def report(done: int, total: int) -> None:
        if terminal or done == total:
            begin, end = "\r" if terminal else "", "\n" if done == total else ""
            print(f"{begin}{what}: {done}/{total} {unit}", end=end, file=sys.stderr, flush=True)

    return report


if __name__ == "__main__":
    sys.exit(main())
