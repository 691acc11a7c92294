"""Index arrays of the FlashInfer-shaped classes: copied from the host, and checked where they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import device_array

import jaxattn as ja

PAGE_SIZE, NUM_PAGES, HEADS = 4, 8, (2, 1, 16)
f32, i32 = jnp.float32, np.int32

# Two requests of 8 and 7 tokens, two query tokens each in a prefill.
ARRAYS = dict(
    qo_indptr=np.array([0, 2, 4], i32),
    indptr=np.array([0, 2, 4], i32),
    indices=np.array([1, 2, 3, 4], i32),
    last_page_len=np.array([4, 3], i32),
    kv_indptr=np.array([0, 8, 15], i32),
)
# What a server writes to its buffers for the next step.
NEXT = dict(
    qo_indptr=[0, 1, 2],
    indptr=[0, 1, 2],
    indices=[7] * 4,
    last_page_len=[1, 1],
    kv_indptr=[0, 1, 2],
)


def filled(shape, seed):
    return device_array(np.random.default_rng(seed).standard_normal(shape), f32)


CACHE = filled((NUM_PAGES, 2, PAGE_SIZE, 1, 16), 0)
Q = filled((4, 2, 16), 1)
K, V = filled((15, 1, 16), 2), filled((15, 1, 16), 3)
PREFILL = ("indptr", "indices", "last_page_len")


def decode(**arrays):
    wrapper = ja.BatchDecodeWithPagedKVCacheWrapper(None)
    table = [arrays[x] for x in PREFILL]
    wrapper.plan(*table, *HEADS, PAGE_SIZE, q_data_type="float32")
    return lambda cache=CACHE: wrapper.run(Q[:2], cache)


def graph_decode(**arrays):
    wrapper = ja.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(
        None, max_batch_size=2, max_num_pages=4
    )
    table = [arrays[x] for x in PREFILL]
    wrapper.plan(*table, *HEADS, PAGE_SIZE, q_data_type="float32")
    return lambda cache=CACHE: wrapper.run(Q[:2], cache)


def paged_prefill(**arrays):
    wrapper = ja.BatchPrefillWithPagedKVCacheWrapper(None)
    table = [arrays[x] for x in PREFILL]
    wrapper.plan(arrays["qo_indptr"], *table, *HEADS, PAGE_SIZE, causal=True, q_data_type="float32")
    return lambda cache=CACHE: wrapper.run(Q, cache)


def ragged_prefill(**arrays):
    wrapper = ja.BatchPrefillWithRaggedKVCacheWrapper(None)
    ends = (arrays["qo_indptr"], arrays["kv_indptr"])
    wrapper.plan(*ends, *HEADS, causal=True, q_data_type="float32")
    return lambda: wrapper.run(Q, K, V)


PAGED = [decode, graph_decode, paged_prefill]
ALL = [*PAGED, ragged_prefill]


def buffer_of(x):
    """A buffer as servers keep: aligned, so that XLA on a CPU reads it in place."""
    memory = np.empty(x.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    buffer = memory[start : start + x.nbytes].view(x.dtype)
    buffer[:] = x
    return buffer


@pytest.mark.parametrize("qo_indptr_on", ["host", "device"])
@pytest.mark.parametrize("planned", ALL)
def test_buffers_may_be_refilled_after_plan(planned, qo_indptr_on):
    expected = planned(**ARRAYS)()
    busy = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, x: x @ x * 1e-3, x))
    busy(jnp.ones((300, 300))).block_until_ready()
    for _ in range(5):
        buffers = {name: buffer_of(x) for name, x in ARRAYS.items()}
        arrays = dict(buffers)
        if qo_indptr_on == "device":
            arrays["qo_indptr"] = jnp.array(ARRAYS["qo_indptr"])
        load = [busy(jnp.ones((300, 300))) for _ in range(4)]
        run = planned(**arrays)
        for name, buffer in buffers.items():
            buffer[:] = NEXT[name]
        np.testing.assert_array_equal(run(), expected)
        jax.block_until_ready(load)


WRONG = [
    (dict(last_page_len=[0, 3]), r"last_page_len\[0\] must be from 1 to page_size=4, .* got 0"),
    (dict(last_page_len=[4, 5]), r"last_page_len\[1\] must be from 1 to page_size=4, .* got 5"),
    (dict(last_page_len=[-1, 3]), r"last_page_len\[0\] must be from 1 .* got -1"),
    (dict(indptr=[0, 4, 4]), r"last_page_len\[1\] must be 0, as request 1 has no pages; got 3"),
    (dict(indices=[1, -1, 3, 4]), r"indices\[1\] must be a page id, at least 0; got -1"),
    (dict(indices=[1, 2, 3]), r"indices must have (paged_kv_)?indptr\[-1\]=4 elements; got 3"),
    (dict(indptr=[0, 2**31 - 1, -(2**31)]), "indptr must start at 0 and not decrease"),
]


@pytest.mark.parametrize("as_given", [list, lambda x: np.asarray(x, i32)], ids=["list", "numpy"])
@pytest.mark.parametrize("wrong,message", WRONG)
@pytest.mark.parametrize("planned", PAGED)
def test_impossible_tables(planned, wrong, message, as_given):
    with pytest.raises(ValueError, match=message):
        planned(**ARRAYS | {name: as_given(x) for name, x in wrong.items()})


@pytest.mark.parametrize("planned", PAGED)
def test_page_ids_must_be_in_the_cache(planned):
    """Known when the cache is seen; entries that no request owns may hold anything."""
    run = planned(**ARRAYS | dict(indices=np.array([1, 2, 3, 1000], i32)))
    with pytest.raises(ValueError, match=r"indices\[3\] must be .* from 0 to 7, .*=8; got 1000"):
        run()
    run = planned(**ARRAYS)
    expected = run(CACHE[:5])
    with pytest.raises(ValueError, match=r"from 0 to 3, as the cache has num_pages=4; got 4"):
        run(CACHE[:4])
    np.testing.assert_array_equal(run(ja.PagedKVCache(CACHE[:5])), expected)
    unused = dict(indptr=[0, 2, 3], indices=np.array([1, 2, 3, -7], i32))
    assert jnp.isfinite(planned(**ARRAYS | unused)()).all()


@pytest.mark.parametrize("planned", PAGED)
def test_arrays_on_the_device_are_not_read(planned):
    wrong = dict(
        indices=jnp.array([1, 2, 3, 1000], jnp.int32), last_page_len=jnp.array([0, 9], jnp.int32)
    )
    with jax.transfer_guard_device_to_host("disallow"):
        run = planned(**ARRAYS | wrong)
        run()


NOT_INDICES = [
    (5, TypeError, "must be an int32 array, or a list of integers that fit one; got 5"),
    ([0, 1.5, 4], TypeError, "must be an int32 array, or a list of integers that fit one; got"),
    ([0, [2], 4], TypeError, "must be an int32 array, or a list of integers that fit one; got"),
    ([0, 2, 2**70], TypeError, "must be an int32 array, or a list of integers that fit one; got"),
    ([0, 2, 2**40], ValueError, "must fit int32; got 1099511627776"),
    ([True, False, True], TypeError, "must be an int32 array, or a list of integers"),
    (np.array([0, 2, 4]), TypeError, r"must be int32; got int64: use .*\.astype\(np.int32\)"),
    (jnp.array([0.0, 2, 4]), TypeError, r"must be int32; got float32: use .*astype\(jnp.int32\)"),
]


@pytest.mark.parametrize("value,error,message", NOT_INDICES)
@pytest.mark.parametrize("planned", ALL)
def test_what_is_no_index_array(planned, value, error, message):
    name = "kv_indptr" if planned is ragged_prefill else "indptr"
    with pytest.raises(error, match=f"{name} {message}"):
        planned(**ARRAYS | {name: value})
