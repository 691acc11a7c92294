"""The cache's forms, the page table's arithmetic, and where a token lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import device_array, i32s

import jaxattn as ja


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("combined", [False, True])
def test_zeros(layout, combined):
    cache = ja.PagedKVCache.zeros(7, 5, 2, 64, jnp.float16, layout=layout, combined=combined)
    page = (5, 2) if layout == "NHD" else (2, 5)
    assert cache.k.shape == cache.v.shape == (7, *page, 64)
    assert [x.shape for x in cache.arrays] == (
        [(7, 2, *page, 64)] if combined else [(7, *page, 64)] * 2
    )
    assert (cache.num_pages, cache.page_size, cache.num_kv_heads, cache.head_dim) == (7, 5, 2, 64)
    assert cache.dtype == jnp.float16
    assert not any(np.asarray(x).any() for x in cache.arrays)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("combined", [False, True])
def test_row_strides_find_every_vector(layout, combined):
    n, p, heads, d = 3, 4, 5, 2
    cache = ja.PagedKVCache.zeros(n, p, heads, d, jnp.float32, layout=layout, combined=combined)
    numbers = np.arange(sum(x.size for x in cache.arrays), dtype=np.float32)
    arrays = [
        x.reshape(y.shape)
        for x, y in zip(np.split(numbers, len(cache.arrays)), cache.arrays, strict=True)
    ]
    cache = ja.PagedKVCache(device_array(arrays[0]) if combined else tuple(arrays), layout)
    rows = [np.asarray(x).reshape(-1, d) for x in cache.arrays]
    strides = cache.row_strides
    for page, slot, head in np.ndindex(n, p, heads):
        row = page * strides.page + slot * strides.slot + head * strides.head
        at = (page, slot, head) if layout == "NHD" else (page, head, slot)
        np.testing.assert_array_equal(rows[0][row], np.asarray(cache.k)[at])
        np.testing.assert_array_equal(rows[-1][row + strides.value], np.asarray(cache.v)[at])


def test_cache_is_a_pytree_with_a_static_layout():
    cache = ja.PagedKVCache.zeros(3, 4, 2, 8, layout="HND")
    doubled = jax.jit(lambda c: jax.tree.map(lambda x: x + 1, c))(cache)
    assert doubled.layout == "HND"
    assert np.asarray(doubled.k.astype(jnp.float32)).all()
    assert jax.tree.structure(cache) != jax.tree.structure(ja.PagedKVCache.zeros(3, 4, 2, 8))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_from_flashinfer(layout):
    page = (4, 2) if layout == "NHD" else (2, 4)
    pair = tuple(jnp.zeros((3, *page, 8)) for _ in range(2))
    cache = ja.PagedKVCache.from_flashinfer(pair, layout)
    assert (cache.page_size, cache.num_kv_heads, cache.combined) == (4, 2, False)
    cache = ja.PagedKVCache.from_flashinfer(jnp.zeros((3, 2, *page, 8)), layout)
    assert (cache.page_size, cache.num_kv_heads, cache.combined) == (4, 2, True)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_from_flashinfer_without_the_page_axis(layout):
    """Pages of one token."""
    k, v = jnp.arange(48.0).reshape(3, 2, 8), -jnp.arange(48.0).reshape(3, 2, 8)
    for given in ((k, v), jnp.stack([k, v], axis=1)):
        cache = ja.PagedKVCache.from_flashinfer(given, layout)
        assert (cache.num_pages, cache.page_size, cache.num_kv_heads) == (3, 1, 2)
        np.testing.assert_array_equal(np.asarray(cache.k).reshape(k.shape), np.asarray(k))
        np.testing.assert_array_equal(np.asarray(cache.v).reshape(v.shape), np.asarray(v))


X = jnp.zeros((3, 4, 2, 8))


@pytest.mark.parametrize(
    "error,message,make",
    [
        (KeyError, "kv_layout must be", lambda: ja.PagedKVCache.from_flashinfer((X, X), "DHN")),
        (KeyError, "got a list", lambda: ja.PagedKVCache.from_flashinfer([X, X])),
        (ValueError, "got 3 arrays", lambda: ja.PagedKVCache.from_flashinfer((X, X, X))),
        (
            ValueError,
            "k pages must have shape",
            lambda: ja.PagedKVCache.from_flashinfer((X[None],) * 2),
        ),
        (ValueError, "combined cache must have", lambda: ja.PagedKVCache.from_flashinfer(X[0])),
        (ValueError, "combined cache must have", lambda: ja.PagedKVCache.from_flashinfer(X)),
        (ValueError, "v pages must have shape", lambda: ja.PagedKVCache((X, X[:2])).check()),
        (ValueError, "got 1 arrays", lambda: ja.PagedKVCache((X,)).check()),
        (ValueError, "layout must be one of", lambda: ja.PagedKVCache((X, X), "DHN").check()),
        (
            TypeError,
            "k and v pages must have one dtype",
            lambda: ja.PagedKVCache((X, X.astype(jnp.bfloat16))).check(),
        ),
        (
            TypeError,
            "k pages must be one of",
            lambda: ja.PagedKVCache((X.astype(jnp.int32),) * 2).check(),
        ),
        (ValueError, "page_size must be a positive", lambda: ja.PagedKVCache.zeros(1, 0, 1, 8)),
        (
            ValueError,
            "layout must be one of",
            lambda: ja.PagedKVCache.zeros(1, 1, 1, 8, layout="X"),
        ),
    ],
)
def test_cache_errors(error, message, make):
    with pytest.raises(error, match=message):
        make()


LENGTHS = [0, 1, 4, 5, 6, 0, 17]


def make_table(page_size):
    """(lengths, the pages of each request, the table), its spare entries nonsense."""
    counts = [-(-n // page_size) for n in LENGTHS]
    order = np.random.default_rng(0).permutation(sum(counts))
    ends = np.cumsum(counts)
    pages = [order[end - count : end].tolist() for end, count in zip(ends, counts, strict=True)]
    last = [n - (c - 1) * page_size if c else 0 for n, c in zip(LENGTHS, counts, strict=True)]
    indices = i32s(*order, 999, -999)
    return pages, ja.PageTable(i32s(0, *ends), indices, i32s(*last))


@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_page_table(page_size):
    pages, table = make_table(page_size)
    table.check()
    assert table.batch_size == len(LENGTHS)
    assert table.kv_len(page_size).tolist() == LENGTHS
    dense = jax.jit(lambda t: t.to_block_table(20))(table)
    assert dense.dtype == jnp.int32
    for row, own in zip(dense.tolist(), pages, strict=True):
        assert row == own + [-1] * (20 - len(own))


@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_block_table_round_trip(page_size):
    pages, _ = make_table(page_size)
    # What lies past a request's pages is ignored.
    block_table = i32s(*(own + [777] * (20 - len(own)) for own in pages))
    table = jax.jit(ja.PageTable.from_block_table, static_argnums=2)(
        block_table, i32s(*LENGTHS), page_size
    )
    table.check()
    assert table.kv_len(page_size).tolist() == LENGTHS
    assert table.to_block_table(20).tolist() == [own + [-1] * (20 - len(own)) for own in pages]
    assert table.last_page_len.tolist() == make_table(page_size)[1].last_page_len.tolist()


def test_block_table_cuts_long_rows():
    _, table = make_table(5)
    assert table.to_block_table(1).shape == (len(LENGTHS), 1)


def test_seq_lens_of_no_pages_ignore_the_last_page():
    assert ja.get_seq_lens(i32s(0, 0, 2), i32s(3, 3), 5).tolist() == [0, 8]


@pytest.mark.parametrize("nnz", [7, 10])
def test_batch_indices_positions(nnz):
    """The appended tokens are the last ones of their requests; rows past them are padding."""
    batch, positions = jax.jit(ja.get_batch_indices_positions, static_argnums=2)(
        i32s(0, 2, 2, 3, 7), i32s(5, 9, 1, 4), nnz
    )
    assert batch.dtype == positions.dtype == jnp.int32
    assert batch.tolist() == [0, 0, 2, 3, 3, 3, 3] + [-1] * (nnz - 7)
    assert positions.tolist() == [3, 4, 0, 0, 1, 2, 3] + [0] * (nnz - 7)


def test_index_arithmetic_transforms():
    """Seq lens, then positions of one new token a request, a step a time."""
    indptr, last = jnp.stack([i32s(0, 2, 2), i32s(0, 1, 4)]), jnp.stack([i32s(3, 0), i32s(1, 5)])

    def step(indptr, last):
        lens = ja.get_seq_lens(indptr, last, 5)
        new = jnp.minimum(lens, 1)
        append_indptr = jnp.pad(jnp.cumsum(new, dtype=jnp.int32), (1, 0))
        return lens, *ja.get_batch_indices_positions(append_indptr, lens, 2)

    want = [[8, 0], [1, 15]], [[0, -1], [0, 1]], [[7, 0], [0, 14]]
    _, scanned = jax.lax.scan(lambda c, xs: (c, step(*xs)), 0, (indptr, last))
    for got in (jax.vmap(step)(indptr, last), scanned):
        assert [x.tolist() for x in got] == list(want)


def test_batch_indices_positions_of_nothing():
    batch, positions = ja.get_batch_indices_positions(i32s(0, 0, 0), i32s(3, 0), 2)
    assert batch.tolist() == [-1, -1]
    assert positions.tolist() == [0, 0]


@pytest.mark.parametrize(
    "error,message,make",
    [
        (
            ValueError,
            "block_table must have",
            lambda: ja.PageTable.from_block_table(i32s(1), i32s(1), 1),
        ),
        (
            ValueError,
            "kv_len must have shape",
            lambda: ja.PageTable.from_block_table(i32s([1], [2]), i32s(1), 1),
        ),
        (
            ValueError,
            "page_size must be a positive",
            lambda: ja.PageTable.from_block_table(i32s([1]), i32s(1), 0),
        ),
        (
            ValueError,
            "max_pages must be a positive",
            lambda: ja.PageTable(i32s(0, 1), i32s(0), i32s(1)).to_block_table(0),
        ),
        (
            ValueError,
            "kv_indptr must have",
            lambda: ja.PageTable(i32s(0), i32s(0), i32s(1)).check(),
        ),
        (
            TypeError,
            "kv_indices must be int32",
            lambda: ja.PageTable(i32s(0, 1), jnp.zeros(1), i32s(1)).check(),
        ),
        (
            ValueError,
            "page_size must be a positive",
            lambda: ja.get_seq_lens(i32s(0, 1), i32s(1), -1),
        ),
        (
            ValueError,
            "nnz must be an integer of at least 0; got 2.5",
            lambda: ja.get_batch_indices_positions(i32s(0, 1), i32s(1), 2.5),
        ),
        (
            ValueError,
            "append_indptr must have",
            lambda: ja.get_batch_indices_positions(i32s(0), i32s(1), 3),
        ),
        (
            TypeError,
            "seq_lens must be int32",
            lambda: ja.get_batch_indices_positions(i32s(0, 1), jnp.ones(1), 3),
        ),
    ],
)
def test_table_errors(error, message, make):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("page_size", [1, 4, 12])
def test_dense_caches_are_pages(page_size):
    """There and back by reshapes, with the table that says where a token lies."""
    k, v = (jnp.arange(3 * 12 * 2 * d, dtype=jnp.float32).reshape(3, 12, 2, d) for d in (8, 5))
    cache = ja.PagedKVCache.from_dense(k, v, page_size)
    cache.check()
    assert cache.page_size == page_size
    table = ja.PageTable.contiguous(i32s(12, 0, 7), 12, page_size)
    assert table.kv_len().tolist() == [12, 0, 7]
    assert table.page_size == page_size
    pages = np.asarray(table.to_block_table(12 // page_size))
    for request, position in ((0, 0), (0, 11), (2, 6)):
        at = pages[request, position // page_size], position % page_size
        np.testing.assert_array_equal(np.asarray(cache.k[at]), np.asarray(k[request, position]))
        np.testing.assert_array_equal(np.asarray(cache.v[at]), np.asarray(v[request, position]))
    for x, y in zip(cache.to_dense(3), (k, v), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))

    def there_and_back(k, v):
        return ja.PagedKVCache.from_dense(k + 1, v + 1, page_size).to_dense(3)

    compiled = jax.jit(there_and_back, donate_argnums=(0, 1)).lower(k, v).compile()
    assert compiled.memory_analysis().temp_size_in_bytes == 0


def test_contiguous_rounds_up_to_pages():
    table = ja.PageTable.contiguous(i32s(5, 9), 9, 4)
    assert table.to_block_table(3).tolist() == [[0, 1, -1], [3, 4, 5]]


@pytest.mark.parametrize(
    "error,message,make",
    [
        (ValueError, "must divide the 10 tokens.*or make the cache 12", lambda: dense_cache(10, 4)),
        (ValueError, "page_size must be", lambda: dense_cache(10, 0)),
        (
            ValueError,
            "k must have shape",
            lambda: ja.PagedKVCache.from_dense(jnp.ones((2, 8)), jnp.ones((2, 8)), 4),
        ),
        (ValueError, "batch_size must divide", lambda: dense_cache(8, 4).to_dense(3)),
        (
            ValueError,
            "layout 'NHD'",
            lambda: ja.PagedKVCache.zeros(4, 4, 2, 8, layout="HND").to_dense(2),
        ),
        (
            ValueError,
            "arrays of their own",
            lambda: ja.PagedKVCache.zeros(4, 4, 2, 8, combined=True).to_dense(2),
        ),
        (ValueError, "max_len", lambda: ja.PageTable.contiguous(i32s(1), 0, 4)),
        (TypeError, "kv_len must be int32", lambda: ja.PageTable.contiguous(jnp.ones(2), 8, 4)),
        (
            ValueError,
            "kv_len must be in",
            lambda: ja.PageTable.contiguous(np.array([9], np.int32), 8, 4),
        ),
    ],
)
def test_dense_caches_that_cannot_be(error, message, make):
    with pytest.raises(error, match=message):
        make()


def dense_cache(s, page_size):
    return ja.PagedKVCache.from_dense(*[jnp.ones((2, s, 2, 8))] * 2, page_size)
