"""The decode loop as a compiled program: its memory, and that it never waits for the host."""

import re

import jax
import jax.numpy as jnp
import pytest
from tiny import CONFIG, random_params

from benchmarks import compiled
from jaxattn.models import decoder
from jaxattn.steps import Draws, Requests, Sampling, State, decode_steps


def decode_loop(config, dtype, *, num_pages, num_steps, sampling, kv_dtype=None):
    """A call of the decode loop with a cache of any size, none of it allocated: (function, arguments)."""
    b, page_size = 3, 16
    index = jax.ShapeDtypeStruct((b,), jnp.int32)
    params = jax.eval_shape(lambda: random_params(config, dtype))
    state = State(
        jax.eval_shape(
            lambda: decoder.empty_caches(config, num_pages, page_size, kv_dtype or dtype)
        ),
        index,
        index,
        index,
        jax.ShapeDtypeStruct((b,), bool),
    )
    requests = Requests(
        (jax.ShapeDtypeStruct((b, 8), jnp.int32),) * len(config.windows),
        index,
        index,
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), b)),
        (jax.ShapeDtypeStruct((128, config.head_dim), jnp.float32),) * len(config.ropes),
        Draws(
            *(jax.ShapeDtypeStruct((b,), dtype) for dtype in ("float32", "int32", *["float32"] * 2))
        )
        if sampling.draws
        else None,
    )
    static = dict(num_steps=num_steps, config=config, sampling=sampling, backend=None)
    return jax.jit(lambda *args: decode_steps(*args, **static), donate_argnums=1), (
        params,
        state,
        requests,
    )


def compiled_loop(config, dtype, **sizes):
    loop, args = decode_loop(config, dtype, sampling=Sampling(draws=True, limits=True), **sizes)
    return loop.lower(*args).compile()


def check_one_copy_of_the_cache(dtype, kv_dtype=None):
    num_pages = 8192
    loop = compiled_loop(CONFIG, dtype, num_pages=num_pages, num_steps=16, kv_dtype=kv_dtype)
    itemsize = jnp.dtype(kv_dtype or dtype).itemsize
    one_array = num_pages * 16 * CONFIG.num_kv_heads * CONFIG.head_dim * itemsize
    memory = loop.memory_analysis()
    # K and V of every layer come in and go out in the same buffers, and nothing else is large.
    assert memory.alias_size_in_bytes >= 2 * CONFIG.num_layers * one_array
    assert memory.temp_size_in_bytes < one_array / 4
    program = loop.as_text()
    cache_shape = re.escape(f"[{num_pages},16,{CONFIG.num_kv_heads},{CONFIG.head_dim}]")
    assert re.search(cache_shape, program)
    assert not re.findall(rf".*{cache_shape}\S* copy.*", program)


@pytest.mark.slow
def test_loop_holds_one_copy_of_the_cache():
    check_one_copy_of_the_cache(jnp.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [None, jnp.float8_e4m3fn])
def test_loop_holds_one_copy_of_the_cache_on_a_gpu(kv_dtype):
    check_one_copy_of_the_cache(jnp.bfloat16, kv_dtype)


def test_memory_does_not_grow_with_the_tokens():
    few, many = (
        compiled_loop(CONFIG, jnp.float32, num_pages=64, num_steps=steps).memory_analysis()
        for steps in (1, 1024)
    )
    # A call holds the tokens of its own steps, however many calls there are.
    assert many.temp_size_in_bytes - few.temp_size_in_bytes <= 2 * 1024 * 3 * 4


def host_round_trips(program: str) -> list[str]:
    """The instructions of a program compiled for a GPU at which the device waits for the host.

    XLA reads the predicate of a `while` on the host, once a trip, unless it knows the number of trips; that
    of a `conditional`, always.
    """
    waits = r" (while|conditional|infeed|outfeed|send|recv)\(|callback"
    return [
        line
        for line in program.splitlines()
        if re.search(waits, line) and "known_trip_count" not in line
    ]


def check_no_host_round_trip_per_token(compile):
    """`compile(function, *arguments)` gives the text of a GPU's program."""
    # What the loop must not be: this one ends by what its steps compute.
    x = jax.ShapeDtypeStruct((3,), jnp.int32)
    uncounted = lambda x: jax.lax.while_loop(lambda x: (x < 9).any(), lambda x: x * x, x)
    assert len(host_round_trips(compile(uncounted, x))) == 1

    for sampling in (Sampling(), Sampling(draws=True, limits=True)):
        loop, args = decode_loop(
            CONFIG, jnp.bfloat16, num_pages=64, num_steps=16, sampling=sampling
        )
        program = compile(loop, *args)
        assert re.search(r' while\(.*"known_trip_count":\{"n":"16"\}', program)
        assert not host_round_trips(program)


def test_an_h200_never_waits_for_the_host_between_tokens():
    pytest.importorskip("jax_cuda13_plugin", reason="it compiles for a GPU")
    if jax.config.jax_platforms != "cpu":
        pytest.skip("JAX compiles for a GPU that is not there under JAX_PLATFORMS=cpu only")

    def compile(fn, *args):
        return compiled.lower_for("h200", fn, *args).compile().as_text()

    check_no_host_round_trip_per_token(compile)


@pytest.mark.gpu
def test_this_gpu_never_waits_for_the_host_between_tokens():
    check_no_host_round_trip_per_token(
        lambda fn, *args: jax.jit(fn).lower(*args).compile().as_text()
    )
