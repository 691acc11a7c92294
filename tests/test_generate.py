"""Generation: the loop against dense attention, its limits, stops and draws, and what it keeps and compiles.

The oracle is `dense_logits` of the demo, which knows neither pages nor kernels.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import device_array, i32
from tiny import CONFIG, random_params, random_prompts

from examples import demo
from jaxattn.call import Choices, check_call
from jaxattn.generate import Generator, Sizes, generate
from jaxattn.generator import round_up
from jaxattn.models import decoder
from jaxattn.outputs import first_stop, may_stop
from jaxattn.page_rings import allocate_pages
from jaxattn.steps import Draws, Sampling, sample

PARAMS = random_params(CONFIG)
PROMPTS = random_prompts([1, 30, 9, 16])
LIMITS = [20, 9, 1, 33]


@pytest.fixture(scope="module")
def greedy() -> list[list[int]]:
    return generate(PARAMS, CONFIG, PROMPTS, max_new_tokens=LIMITS).tokens


@pytest.mark.slow
def test_greedy_tokens_are_dense_attentions(greedy):
    assert list(map(len, greedy)) == LIMITS
    # If each token is dense attention's choice after those before it, its greedy tokens are these.
    for prompt, tokens in zip(PROMPTS, greedy, strict=True):
        before = i32(prompt + tokens[:-1])
        logits = demo.dense_logits(PARAMS, CONFIG, before, jnp.float32)[len(prompt) - 1 :]
        assert np.argmax(logits, axis=-1).tolist() == tokens


@pytest.mark.parametrize(
    "how",
    [
        dict(prefill_chunk=7),
        dict(prefill_chunk=1, stream_every=5),
        dict(page_size=1, num_pages=200),
        dict(seed=1, stream_every=100),
    ],
    ids=str,
)
def test_how_it_is_cut_changes_no_token(greedy, how):
    assert generate(PARAMS, CONFIG, PROMPTS, max_new_tokens=LIMITS, **how).tokens == greedy


def test_a_prompt_alone_gives_what_it_gives_in_a_batch(greedy):
    alone = generate(PARAMS, CONFIG, PROMPTS[1:2], max_new_tokens=LIMITS[1])
    assert alone.tokens == greedy[1:2]


@pytest.mark.slow
def test_kernels_in_a_batch_that_is_filled_up():
    # Three requests run as four, the last without tokens.
    options = dict(max_new_tokens=[5, 3, 1], stream_every=4)
    wanted = generate(PARAMS, CONFIG, PROMPTS[:3], **options).tokens
    interpreted = generate(PARAMS, CONFIG, PROMPTS[:3], **options, backend="interpret")
    assert interpreted.tokens == wanted


def test_an_fp8_cache(greedy):
    """It holds float8 and a scale for each token and head; a generator keeps it."""
    generator = Generator(PARAMS, CONFIG, kv_dtype="fp8")
    first = generator.generate(PROMPTS, max_new_tokens=LIMITS).tokens
    assert list(map(len, first)) == LIMITS
    cache = generator._caches[0]
    assert cache.dtype == jnp.float8_e4m3fn
    assert cache.k_scale.shape == cache.k.shape[:-1]
    assert generator.generate(PROMPTS, max_new_tokens=LIMITS).tokens == first
    # Prompts as they stand are long enough that most first tokens agree with those of a float32 cache.
    agree = [a[0] == b[0] for a, b in zip(first, greedy, strict=True)]
    assert sum(agree) >= 3
    with pytest.raises(ValueError, match="kv_dtype must be 'fp8' or one of"):
        Generator(PARAMS, CONFIG, kv_dtype="bfloat16")


def test_eos_ends_a_request_and_no_other(greedy):
    eos = [greedy[0][4], greedy[3][0]]
    result = generate(PARAMS, CONFIG, PROMPTS, max_new_tokens=LIMITS, eos_token_ids=eos)
    for tokens, full in zip(result.tokens, greedy, strict=True):
        ends = [i for i, token in enumerate(full) if token in eos]
        assert tokens == full[: ends[0] + 1 if ends else None]
    assert len(result.tokens[0]) <= 5 and len(result.tokens[3]) == 1


def test_tokens_stream_in_chunks(greedy):
    pieces = [[] for _ in PROMPTS]
    progress = []
    generate(
        PARAMS,
        CONFIG,
        PROMPTS,
        max_new_tokens=LIMITS,
        prefill_chunk=7,
        stream_every=5,
        stream=lambda request, tokens: pieces[request].append(tokens),
        progress=lambda *args: progress.append(args),
    )
    assert [sum(request, []) for request in pieces] == greedy
    assert [len(piece) for piece in pieces[0]] == [1, 5, 5, 5, 4]
    assert progress[0] == (7, 56) and progress[-1] == (56, 56) and len(progress) == 8


@pytest.mark.slow
def test_draws_follow_the_seed_alone():
    def draw(**how):
        options = dict(max_new_tokens=12, temperature=0.9, top_p=0.95) | how
        return generate(PARAMS, CONFIG, PROMPTS, **options).tokens

    first = draw(seed=3)
    assert draw(seed=3, prefill_chunk=7, stream_every=5) == first
    assert draw(seed=4) != first
    twins = generate(PARAMS, CONFIG, PROMPTS[:1] * 2, max_new_tokens=12, temperature=1.0).tokens
    assert twins[0] != twins[1]


def test_sample():
    logits = jnp.log(device_array([[0.1, 0.5, 0.3, 0.1], [0.25, 0.2, 0.3, 0.25]], jnp.float32))

    def drawn(request, n=500, *, temperature, top_p=1.0):
        keys = jax.random.split(jax.random.key(0), n)
        rows = jnp.broadcast_to(logits[request], (n, 4))
        draws = Draws(
            jnp.full(n, temperature),
            jnp.full(n, 2**31 - 1, jnp.int32),
            jnp.full(n, top_p),
            jnp.zeros(n),
        )
        tokens = np.asarray(sample(rows, keys, draws, Sampling(draws=True, limits=top_p < 1)))
        return np.bincount(tokens, minlength=4) / n

    keys = jax.random.split(jax.random.key(0), 2)
    assert sample(logits, keys, None, Sampling()).tolist() == [1, 2]
    np.testing.assert_allclose(drawn(0, temperature=1.0), [0.1, 0.5, 0.3, 0.1], atol=0.1)
    np.testing.assert_allclose(drawn(0, temperature=0.1), [0, 1, 0, 0], atol=0.05)
    np.testing.assert_allclose(drawn(0, temperature=1.0, top_p=0.4), [0, 1, 0, 0])
    # 0.5 falls short of 0.6, so the second likeliest joins.
    np.testing.assert_allclose(drawn(0, temperature=1.0, top_p=0.6), [0, 5 / 8, 3 / 8, 0], atol=0.1)
    np.testing.assert_allclose(drawn(1, temperature=1.0, top_p=1e-6), [0, 0, 1, 0])
    assert (drawn(1, temperature=1.0, top_p=0.9) > 0).all()


def test_choices_may_be_arrays():
    """Of NumPy or JAX; and a temperature that float32 does not hold draws as any very high one."""

    def call(**choices):
        prompts = [[1, 2], [3]]
        choices = Choices(**choices)
        return check_call(CONFIG, Sizes(), prompts, max_new_tokens=3, choices=choices)

    listed = call(temperature=[0.5, 2.0], top_k=[3, 9], top_p=[0.25, 1.0], min_p=0.5).draws
    for array in (np.asarray, jnp.asarray):
        arrays = dict(temperature=array([0.5, 2.0]), top_k=array([3, 9]), top_p=array([0.25, 1.0]))
        assert call(**arrays, min_p=array(0.5)).draws == listed
    assert call(temperature=jnp.float32(2)).draws == call(temperature=2.0).draws
    (hot, _) = call(temperature=1e300).draws
    assert 1e20 < hot.temperature == np.float32(hot.temperature) < np.inf


@pytest.mark.slow
def test_requests_draw_side_by_side(greedy):
    """Each with its own limits; those that leave one token give the greedy ones."""
    n = 6
    draw = functools.partial(generate, PARAMS, CONFIG, PROMPTS, max_new_tokens=n, seed=2)
    choices = dict(temperature=[0.0, 1.5, 1.5, 1.5], top_k=[None, 1, None, 7])
    mixed = draw(**choices, top_p=[1.0, 1.0, 1e-6, 0.9], min_p=[0.0, 0.0, 0.0, 0.01]).tokens
    assert [tokens[:n] for tokens in greedy[:2]] == mixed[:2]
    assert mixed[2][:1] == greedy[2]
    assert mixed[3] != greedy[3][:n]
    alike = draw(temperature=[0.0, 0.0, 0.0, 1.5], top_k=7, top_p=0.9, min_p=0.01).tokens
    assert alike[3] == mixed[3]


@pytest.mark.slow
def test_values_of_requests_compile_nothing(caplog):
    def run(**how):
        prompts = random_prompts([3, 20], seed=1)
        return generate(PARAMS, CONFIG, prompts, max_new_tokens=4, stream_every=2, **how)

    assert compilations(caplog, lambda: run(temperature=0.5, top_k=3, logprobs=3)) > 0
    more = dict(temperature=[0.0, 2.0], top_p=[0.4, 1.0], top_k=[None, 9], logprobs=[None, 4])
    assert compilations(caplog, lambda: run(**more, min_p=0.1, seed=4)) == 0


@pytest.mark.slow
def test_logprobs_are_the_models(greedy):
    result = generate(
        PARAMS,
        CONFIG,
        PROMPTS,
        max_new_tokens=LIMITS,
        logprobs=[3, None, 0, 5],
        temperature=[0.0, 0.0, 0.0, 3.0],
        prefill_chunk=7,
        stream_every=5,
    )
    assert [len(own) for own in result.logprobs] == [LIMITS[0], 0, 1, LIMITS[3]]
    assert [len(own) for own in result.top_logprobs] == [LIMITS[0], 0, 1, LIMITS[3]]
    for request, n in ((0, 3), (2, 0), (3, 5)):
        prompt, tokens = PROMPTS[request], result.tokens[request]
        before = i32(prompt + tokens[:-1])
        logits = demo.dense_logits(PARAMS, CONFIG, before, jnp.float32)[len(prompt) - 1 :]
        truth = np.asarray(logits, np.float64)
        truth -= np.log(np.exp(truth).sum(axis=1, keepdims=True))
        own = truth[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(result.logprobs[request], own, atol=1e-4)
        for told, row in zip(result.top_logprobs[request], truth, strict=True):
            likeliest = np.argsort(-row)[:n].tolist()
            assert list(told) == likeliest
            np.testing.assert_allclose(list(told.values()), row[likeliest], atol=1e-4)


def spelled(tokens) -> str:
    """A text in which no token ends where a word does."""
    return "".join(f"{token:03d}" for token in tokens)


@pytest.mark.parametrize("stream_every", [1, 4, 32])
def test_stop_strings_end_a_request(greedy, stream_every):
    """Across tokens, in the first token, of one request and of all; nothing of what follows comes out."""
    across = spelled(greedy[0])[10:17]  # from token 3 to token 5
    first = spelled(greedy[3])[:2]
    pieces = [[] for _ in PROMPTS]
    result = generate(
        PARAMS,
        CONFIG,
        PROMPTS,
        max_new_tokens=LIMITS,
        stop=[["no such text", across], None, [], first],
        decode=spelled,
        stream_every=stream_every,
        logprobs=0,
        stream=lambda request, tokens: pieces[request].extend(tokens),
    )
    at = spelled(greedy[0]).find(across)
    end = -(-(at + len(across)) // 3)
    assert at > 0 and end < LIMITS[0]
    assert result.tokens == [greedy[0][:end], greedy[1], greedy[2], greedy[3][:1]] == pieces
    assert result.texts == [spelled(greedy[0])[:at], *map(spelled, greedy[1:3]), ""]
    assert [len(own) for own in result.logprobs] == [len(own) for own in result.tokens]
    everywhere = generate(
        PARAMS, CONFIG, PROMPTS, max_new_tokens=LIMITS, stop=["no such text", first], decode=spelled
    )
    for text, tokens in zip(everywhere.texts, greedy, strict=True):
        assert text == spelled(tokens).split(first)[0]


@pytest.mark.parametrize(
    "text, stops, end, held",
    [
        ("no end", [], None, 6),
        ("an end, and an end", ["and", " end"], 2, 18),
        ("a STO", ["STOP", "TOM"], None, 2),
        ("a TO", ["STOP", "TOM"], None, 2),
        ("a TOP", ["STOP"], None, 5),
        ("aaa", ["aaaa"], None, 0),
    ],
)
def test_where_a_text_stops(text, stops, end, held):
    assert first_stop(text, stops) == end
    assert may_stop(text, stops) == held


def compilations(caplog, run) -> int:
    """How many programs, large or small, XLA compiles while `run` runs."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        run()
    return sum(record.getMessage().startswith("Compiling") for record in caplog.records)


def test_lengths_of_like_size_compile_nothing(caplog):
    def run(lengths, **how):
        prompts = random_prompts(lengths, seed=1)
        # Another number of steps than other tests', so that their programs do not serve.
        generate(PARAMS, CONFIG, prompts, **dict(max_new_tokens=6, stream_every=3) | how)

    assert compilations(caplog, lambda: run([3, 20])) > 0
    assert compilations(caplog, lambda: run([3, 21])) == 0
    assert compilations(caplog, lambda: run([9, 18], max_new_tokens=[8, 1], seed=3)) == 0
    assert compilations(caplog, lambda: run([3, 20], eos_token_ids=[5])) == 0


@pytest.mark.slow
def test_any_lengths_compile_nothing_in_a_cache_of_given_size(caplog):
    sizes = Sizes(num_pages=20, max_context=64, prefill_chunk=8, stream_every=3)

    def run(lengths, limits):
        generator = Generator(PARAMS, CONFIG, sizes)
        generator.generate(random_prompts(lengths, seed=1), max_new_tokens=limits)

    assert compilations(caplog, lambda: run([20, 3, 5], [28, 4, 1])) > 0
    assert compilations(caplog, lambda: run([7, 40, 9, 8], [1, 8, 2, 2])) == 0


PAGE = 11  # nobody else's, so that arrays of such pages are these tests' caches


def caches() -> list[jax.Array]:
    """The K and V pages that are alive."""
    page = (PAGE, CONFIG.num_kv_heads, CONFIG.head_dim)
    return [x for x in jax.live_arrays() if x.shape[1:] == page]


@pytest.mark.slow
def test_a_generator_keeps_its_cache(greedy, monkeypatch):
    made = []

    def empty_caches(config, num_pages, *args):
        assert not caches()  # what is replaced is gone before
        made.extend(num_pages)
        # What no request owns must not matter.
        return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), make(config, num_pages, *args))

    def buffers():
        held = caches()
        assert len(held) == 2 * CONFIG.num_layers and {x.shape[0] for x in held} == {made[-1]}
        return {x.unsafe_buffer_pointer() for x in held}

    make = decoder.empty_caches
    monkeypatch.setattr(decoder, "empty_caches", empty_caches)
    generator = Generator(PARAMS, CONFIG, Sizes(page_size=PAGE))
    first = generator.generate(random_prompts([3, 20]), max_new_tokens=8)
    before = buffers()
    generator.generate(random_prompts([3, 21]), max_new_tokens=8)
    assert generator.generate(random_prompts([3, 20]), max_new_tokens=8).tokens == first.tokens
    assert made == [4] and buffers() == before
    # More pages than it has: it grows, and then serves the smaller call from the larger cache.
    assert generator.generate(PROMPTS, max_new_tokens=LIMITS).tokens == greedy
    before = buffers()
    assert generator.generate(random_prompts([3, 20]), max_new_tokens=8).tokens == first.tokens
    assert made == [4, 16] and buffers() == before
    del generator
    assert not caches()


def test_generate_keeps_no_cache():
    generate(PARAMS, CONFIG, PROMPTS, max_new_tokens=LIMITS, page_size=PAGE)
    assert not caches()


def test_a_call_that_fails_leaves_a_generator_that_works(greedy):
    generator = Generator(PARAMS, CONFIG, Sizes(page_size=PAGE))

    def stop(*_):
        raise KeyboardInterrupt

    for how in (dict(stream=stop), dict(progress=stop)):
        with pytest.raises(KeyboardInterrupt) as stopped:
            generator.generate(PROMPTS, max_new_tokens=LIMITS, **how)
        # Also while someone holds the traceback, as a notebook does.
        assert stopped.tb is not None and not caches()
        assert generator.generate(PROMPTS, max_new_tokens=LIMITS).tokens == greedy


def test_a_call_within_a_call(greedy):
    generator = Generator(PARAMS, CONFIG)
    inner = []

    def stream(request, tokens):
        if not inner:
            inner.append(generator.generate(PROMPTS, max_new_tokens=LIMITS).tokens)

    outer = generator.generate(PROMPTS, max_new_tokens=LIMITS, stream=stream)
    assert inner == [greedy] and outer.tokens == greedy


@pytest.mark.slow
def test_draws_do_not_depend_on_how_many_requests_there_are():
    def draw(prompts):
        return generate(PARAMS, CONFIG, prompts, max_new_tokens=12, temperature=0.9).tokens

    assert draw(PROMPTS[:1]) == draw(PROMPTS[:3])[:1]


def test_round_up():
    sizes = [round_up(n) for n in range(1, 3000)]
    assert all(n <= size <= max(1.25 * n, 64) for n, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes) and all(round_up(size) == size for size in sizes)
    assert sorted(set(sizes))[:12] == [1, 2, 4, 8, 16, 32, 64, 80, 96, 112, 128, 160]


def test_pages_are_permuted_and_nobodys_twice():
    table = allocate_pages([40, 1, 16, 0], 8, 8, max_pages=6)
    assert table.shape == (4, 6)
    owned = table[table >= 0]
    assert sorted(owned) == list(range(8)) and list(owned) != sorted(owned)
    assert [(row >= 0).sum() for row in table] == [5, 1, 2, 0]


@pytest.mark.parametrize(
    "prompts",
    [
        np.asarray([[5, 6, 7], [8, 9, 10]], np.int64),
        np.asarray([[5, 6, 7], [8, 9, 10]], np.uint8),
        i32([[5, 6, 7], [8, 9, 10]]),
        [np.asarray([5, 6, 7]), (8, 9, 10)],
        (range(5, 8), [np.int32(8), 9, 10]),
    ],
    ids=["int64", "uint8", "jax", "mixed", "range"],
)
def test_what_a_prompt_is(prompts):
    wanted = generate(PARAMS, CONFIG, [[5, 6, 7], [8, 9, 10]], max_new_tokens=4)
    for limits in (4, [4, 4], np.asarray([4, 4]), np.int64(4)):
        got = generate(PARAMS, CONFIG, prompts, max_new_tokens=limits)
        assert got.tokens == wanted.tokens and got.prompt_tokens == 6


def test_eos_token_ids_may_be_one_or_none(greedy):
    def run(eos):
        return generate(PARAMS, CONFIG, PROMPTS, max_new_tokens=LIMITS, eos_token_ids=eos).tokens

    eos = greedy[0][4]
    assert run(None) == run(()) == greedy
    assert run(eos) == run([eos]) == run(np.asarray([eos, eos])) != greedy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompts="1 2"), "prompts must hold the token ids of each request, .*; got '1 2'"),
        (dict(prompts=["1 2", "3"]), "prompts must hold .* 2-D integer array; prompt 0 is '1 2'"),
        (dict(prompts=[1, 2, 3]), "prompts must hold .*; prompt 0 is 1"),
        (dict(prompts=np.asarray([1, 2])), "prompts must hold .*; prompt 0 is"),
        (
            dict(prompts=[[1], [[1, 2], [3]]]),
            r"prompts must hold .*; prompt 1 is \[\[1, 2\], \[3\]\]",
        ),
        (dict(prompts=7), "prompts must hold .*; got 7"),
        (dict(prompts=[[1, 2], None]), "prompts must hold .*; prompt 1 is None"),
        (dict(prompts=[[1], [1.7, 2.2]]), r"integers; prompt 1 holds float64: \[1.7, 2.2\]"),
        (dict(prompts=np.ones((2, 3), np.float32)), "integers; prompt 0 holds float32"),
        (dict(prompts=[[True, False]]), "integers; prompt 0 holds bool"),
        (dict(prompts=[["a", "b"]]), "integers; prompt 0 holds <U1"),
        (dict(prompts=[[1, 2**70]]), "integers; prompt 0 holds object"),
        (dict(eos_token_ids=2.5), "integers; eos_token_ids holds float64"),
        (dict(eos_token_ids="2"), "integers; eos_token_ids holds <U1"),
        (dict(eos_token_ids=[[2]]), "integers; eos_token_ids holds int64"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_is_no_prompt(change, message):
    arguments = dict(prompts=[[1, 2, 3], [4]], max_new_tokens=6) | change
    with pytest.raises(TypeError, match=message):
        generate(PARAMS, CONFIG, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompts=[]), "at least one request; got none"),
        (dict(prompts=[[1], []]), "prompt 1 has none"),
        (dict(prompts=[[1, 256]]), r"must be in \[0, vocab_size=256\); prompt 0 has 1 .. 256"),
        (dict(prompts=[[-1]]), r"prompt 0 has -1 .. -1"),
        (dict(max_new_tokens=0), "max_new_tokens must be a positive integer; got 0"),
        (dict(max_new_tokens=[1]), "one for each of 2 prompts; got 1"),
        (dict(max_new_tokens=1.5), "max_new_tokens must be a positive integer; got 1.5"),
        (dict(max_new_tokens=None), "max_new_tokens must be a positive integer; got None"),
        (dict(max_new_tokens=[1, 0]), "max_new_tokens must be a positive integer; got 0"),
        (dict(eos_token_ids=-1), r"in \[0, vocab_size=256\); eos_token_ids has -1 .. -1"),
        (dict(eos_token_ids=[1, 256]), "eos_token_ids has 1 .. 256"),
        (dict(seed=-1), "seed must be an integer, at least 0; got -1"),
        (dict(seed=1.5), "seed must be an integer, at least 0; got 1.5"),
        (dict(num_pages=0), "num_pages must be a positive integer; got 0"),
        (dict(max_context=0), "max_context must be a positive integer; got 0"),
        (dict(max_context=8), "9 tokens, prompt and new ones, exceeds max_context=8: raise it"),
        (dict(max_context=257), "257 tokens exceeds config.max_position_embeddings=256"),
        (dict(temperature=-0.5), "temperature must be 0 or positive; got -0.5"),
        (dict(top_p=0.0), r"top_p must be in \(0, 1\]; got 0.0"),
        (dict(top_p=[0.5]), "top_p must be one number, or one for each of 2 prompts; got 1"),
        (dict(temperature=[0.5, "1"]), "temperature must be 0 or positive; got '1'"),
        (dict(top_k=[None, 0]), "top_k must be a positive integer; got 0"),
        (dict(min_p=1.5), r"min_p must be in \[0, 1\]; got 1.5"),
        (dict(logprobs=-1), "logprobs must be None or an integer from 0 to"),
        (dict(logprobs=[1, True]), "logprobs must be None or an integer.* got True"),
        (dict(stop="x"), "stop strings need decode="),
        (dict(stop=["x", ""], decode=str), "stop must be strings that are not empty"),
        (dict(stop=5, decode=str), "stop must be strings that are not empty.* got 5"),
        (dict(stop=[None, 5], decode=str), "stop must be strings that are not empty"),
        (dict(stop=[["x"]], decode=str), "or of each of 2 prompts; got 1"),
        (dict(page_size=0), "page_size must be a positive integer; got 0"),
        (dict(prefill_chunk=0), "prefill_chunk must be a positive integer; got 0"),
        (dict(stream_every=0), "stream_every must be a positive integer; got 0"),
        (
            dict(page_size=4, num_pages=4),
            "2 requests need 5 pages of 4 tokens .* the cache has num_pages=4: raise it",
        ),
        (dict(max_new_tokens=300), "303 tokens exceeds config.max_position_embeddings=256"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_errors(change, message):
    arguments = dict(prompts=[[1, 2, 3], [4]], max_new_tokens=6) | change
    with pytest.raises(ValueError, match=message):
        generate(PARAMS, CONFIG, **arguments)


def test_stop_strings_of_a_generator_are_an_error():
    """They would be read once, and be gone for the second request."""
    with pytest.raises(ValueError, match="stop must be strings .* got <generator"):
        generate(PARAMS, CONFIG, [[1, 2]], max_new_tokens=1, stop=(x for x in "ab"), decode=str)
