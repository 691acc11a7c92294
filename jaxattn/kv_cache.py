"""The paged KV cache, as arrays: a pool of `num_pages` pages of `page_size` token slots.

Which of them a request owns, its row of a `PageTable` says. Slots that no request owns may hold anything, NaN included.

Axes: b requests, t tokens, kh KV heads, d head dim, n pages, p page size, w pages of a request.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxattn.checks import (
    FLOAT_DTYPES,
    check_choice,
    check_float,
    check_positive,
    check_shape,
)
from jaxattn.kv_scales import FP8_DTYPES, KVScales

LAYOUTS = ("NHD", "HND")
CACHE_DTYPES = (*FLOAT_DTYPES, *FP8_DTYPES)


class RowStrides(NamedTuple):
    """Where a token's vector lies in a cache seen as rows `[num_rows, d]`:

    `row = page * strides.page + slot * strides.slot + head * strides.head`, plus `strides.value` for V
    where one array holds both K and V.
    """

    page: int
    slot: int
    head: int
    value: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """K and V pages of one layer, a pytree.

    Attributes:
      data: `(k, v)`, each [n, p, kh, d] for layout "NHD" and [n, kh, p, d] for "HND", V's d its own; or one array
        that holds both, [n, 2, p, kh, d] or [n, 2, kh, p, d]. float16, bfloat16, float32, float8_e4m3fn or
        float8_e5m2.
      layout: "NHD" or "HND" (static).
      scales: what the numbers in `data` are multiplied by; None: they are the keys and values themselves.
    """

    data: tuple[Array, Array] | Array
    layout: str = dataclasses.field(default="NHD", metadata=dict(static=True))
    scales: KVScales | None = None

    @classmethod
    def zeros(
        cls,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        *,
        layout: str = "NHD",
        combined: bool = False,
        head_dim_v: int | None = None,
        scales: KVScales | str | None = None,
    ) -> "PagedKVCache":
        """A cache of zeros.

        Args:
          num_pages, page_size, num_kv_heads, head_dim: the shape.
          dtype: float16, bfloat16, float32, float8_e4m3fn or float8_e5m2.
          layout: "NHD" or "HND".
          combined: K and V are one 5-D array.
          head_dim_v: V's, default head_dim.
          scales: given ones; or "token", with a float8 dtype: pages of them, of which an append writes those of its
            tokens, by each token's own largest magnitude in a head.

        Raises:
          ValueError, TypeError: sizes, a dtype, a layout or scales that no cache can have.
        """
        head_dim_v = head_dim if head_dim_v is None else head_dim_v
        check_positive(
            num_pages=num_pages, page_size=page_size, num_kv_heads=num_kv_heads, head_dim=head_dim
        )
        check_positive(head_dim_v=head_dim_v)
        check_choice("layout", layout, LAYOUTS)
        page = (page_size, num_kv_heads) if layout == "NHD" else (num_kv_heads, page_size)
        if combined and head_dim_v != head_dim:
            raise ValueError(
                f"one array holds K and V of one head_dim; got {head_dim=}, {head_dim_v=}: "
                "leave combined=False"
            )
        if isinstance(scales, str):
            check_choice("scales", scales, ("token",))
            scales = KVScales(*(jnp.ones((num_pages, *page), jnp.float32) for _ in "kv"))
        data: tuple[Array, Array] | Array
        if combined:
            data = jnp.zeros((num_pages, 2, *page, head_dim), dtype)
        else:
            k, v = (jnp.zeros((num_pages, *page, d), dtype) for d in (head_dim, head_dim_v))
            data = k, v
        cache = cls(data, layout, scales)
        cache.check()
        return cache

    @classmethod
    def from_flashinfer(
        cls, paged_kv_cache: tuple[Array, Array] | Array, kv_layout: str = "NHD"
    ) -> "PagedKVCache":
        """A cache from what FlashInfer takes: a tuple of 4-D arrays or one 5-D array.

        With page_size 1 the page axis may be missing (3-D arrays or one 4-D array).

        Raises:
          KeyError: unknown kv_layout, or the cache is a list.
          ValueError: the arrays have another number of axes.
        """
        if kv_layout not in LAYOUTS:
            raise KeyError(f"kv_layout must be 'NHD' or 'HND'; got {kv_layout!r}")
        if isinstance(paged_kv_cache, list):
            raise KeyError(
                "paged_kv_cache must be a tuple (k, v) or one array; got a list: use tuple(...)"
            )
        page_axis = -3 if kv_layout == "NHD" else -2
        if isinstance(paged_kv_cache, tuple):
            if len(paged_kv_cache) != 2:
                raise ValueError(f"paged_kv_cache must be (k, v); got {len(paged_kv_cache)} arrays")
            k, v = (jnp.expand_dims(x, page_axis) if x.ndim == 3 else x for x in paged_kv_cache)
            cache = cls((k, v), kv_layout)
        else:
            kv = paged_kv_cache
            cache = cls(jnp.expand_dims(kv, page_axis) if kv.ndim == 4 else kv, kv_layout)
        cache.check()
        return cache

    @classmethod
    def from_dense(cls, k: Array, v: Array, page_size: int) -> "PagedKVCache":
        """A dense cache as pages, by a reshape: those of request i are page i * w to i * w + w - 1, w = s / page_size.

        `PageTable.contiguous` is its table; `to_dense` is the way back.

        Args:
          k, v: [b, s, kh, d], V's d its own.
          page_size: tokens a page; a divisor of s.

        Raises:
          ValueError: shapes that do not fit, a page size that does not divide s.
        """
        check_positive(page_size=page_size)
        check_shape("k", k, ("b", "s", "kh", "d"))
        check_shape("v", v, (*k.shape[:3], "head_dim of v"))
        b, s = k.shape[:2]
        if s % page_size:
            raise ValueError(
                f"page_size must divide the {s} tokens of the dense cache; got {page_size}: "
                f"take a divisor, or make the cache {s + -s % page_size} tokens long"
            )
        pages = (b * (s // page_size), page_size)
        return cls((k.reshape(*pages, *k.shape[2:]), v.reshape(*pages, *v.shape[2:])))

    def to_dense(self, batch_size: int) -> tuple[Array, Array]:
        """(k, v) [b, s, kh, d] of a cache whose pages are those of `from_dense`, by a reshape.

        Raises:
          ValueError: layout "HND", or one array for K and V, whose tokens do not lie side by side; scales; pages that
            the requests cannot share equally.
        """
        self.check()
        if self.layout != "NHD" or self.combined:
            raise ValueError(
                "to_dense needs layout 'NHD' and K and V in arrays of their own; got "
                f"layout={self.layout!r}, combined={self.combined}"
            )
        if self.scales is not None:
            raise ValueError("to_dense must be of a cache without scales: a dense one has none")
        check_positive(batch_size=batch_size)
        if self.num_pages % batch_size:
            raise ValueError(
                f"batch_size must divide the cache's {self.num_pages} pages; got {batch_size}"
            )
        tokens = self.num_pages // batch_size * self.page_size
        k, v = (x.reshape(batch_size, tokens, *x.shape[2:]) for x in (self.k, self.v))
        return k, v

    def check(self) -> None:
        """Raises ValueError or TypeError, with the reason, unless the arrays form a cache."""
        check_choice("layout", self.layout, LAYOUTS)
        if isinstance(self.data, tuple):
            if len(self.data) != 2:
                raise ValueError(f"a cache must be (k, v); got {len(self.data)} arrays")
            k, v = self.data
            check_shape(
                "k pages",
                k,
                ("n", "p", "kh", "d") if self.layout == "NHD" else ("n", "kh", "p", "d"),
            )
            check_shape("v pages", v, (*k.shape[:-1], "head_dim of v"))
            if k.dtype != v.dtype:
                raise TypeError(f"k and v pages must have one dtype; got {k.dtype} and {v.dtype}")
            check_float("k pages", k, CACHE_DTYPES)
        else:
            axes = ("p", "kh") if self.layout == "NHD" else ("kh", "p")
            check_shape("a combined cache", self.data, ("n", 2, *axes, "d"))
            check_float("a combined cache", self.data, CACHE_DTYPES)
        if self.scales is None:
            return
        if not isinstance(self.scales, KVScales):
            raise TypeError(
                f"scales must be KVScales or None; got {type(self.scales).__name__}: "
                "use KVScales.of(k_scale, v_scale)"
            )
        p, heads = self.page_size, self.num_kv_heads
        page = (p, heads) if self.layout == "NHD" else (heads, p)
        self.scales.check((self.num_pages, *page), heads)
        if self.scales.per_token and not self.is_fp8:
            raise TypeError(
                f"scales per token are those of a float8 cache; got {self.dtype}: leave them out, "
                "as 16 bits hold keys and values as they are"
            )

    @property
    def combined(self) -> bool:
        """Whether one array holds both K and V."""
        return not isinstance(self.data, tuple)

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays that hold the cache: (k, v), or the one that holds both."""
        return self.data if isinstance(self.data, tuple) else (self.data,)

    @property
    def k(self) -> Array:
        """K pages [n, p, kh, d] (NHD) or [n, kh, p, d] (HND), as they are stored."""
        return self.data[0] if isinstance(self.data, tuple) else self.data[:, 0]

    @property
    def v(self) -> Array:
        """V pages, shaped as K pages, but for a head_dim of their own."""
        return self.data[1] if isinstance(self.data, tuple) else self.data[:, 1]

    @property
    def num_pages(self) -> int:
        return self.arrays[0].shape[0]

    @property
    def page_size(self) -> int:
        return self.arrays[0].shape[-3 if self.layout == "NHD" else -2]

    @property
    def num_kv_heads(self) -> int:
        return self.arrays[0].shape[-2 if self.layout == "NHD" else -3]

    @property
    def head_dim(self) -> int:
        return self.arrays[0].shape[-1]

    @property
    def head_dim_v(self) -> int:
        """V's head_dim, which may differ from K's where each has an array of its own."""
        return self.arrays[-1].shape[-1]

    @property
    def dtype(self) -> jnp.dtype:
        return self.arrays[0].dtype

    @property
    def is_fp8(self) -> bool:
        return self.dtype.name in FP8_DTYPES

    @property
    def k_scale(self) -> Array | None:
        """What stored keys are multiplied by, float32: [], [kh], or pages without the last axis; None: 1."""
        return None if self.scales is None else self.scales.k

    @property
    def v_scale(self) -> Array | None:
        """Likewise of values."""
        return None if self.scales is None else self.scales.v

    @property
    def row_strides(self) -> RowStrides:
        """The cache's arrangement, seen as rows of head_dim elements."""
        heads, page_size = self.num_kv_heads, self.page_size
        rows = heads * page_size
        slot, head = (heads, 1) if self.layout == "NHD" else (1, page_size)
        if self.combined:
            return RowStrides(page=2 * rows, slot=slot, head=head, value=rows)
        return RowStrides(page=rows, slot=slot, head=head, value=0)


def as_pool(paged_kv_cache: Any) -> tuple[PagedKVCache, Callable[[PagedKVCache], Any]]:
    """A cache in one of the forms that models keep it in, as a `PagedKVCache`; and the way back to that form.

    Args:
      paged_kv_cache: a `PagedKVCache`, or a tuple (k, v) of its arrays in layout "NHD". Where these begin with the
        batch, [b, w, p, kh, d] ("HND": [b, w, kh, p, d]), the pool is its b * w pages.

    Raises:
      TypeError: neither of them.
    """
    if isinstance(paged_kv_cache, PagedKVCache):
        cache, is_tuple = paged_kv_cache, False
    elif isinstance(paged_kv_cache, tuple) and len(paged_kv_cache) == 2:
        cache, is_tuple = PagedKVCache(paged_kv_cache), True
    else:
        raise TypeError(
            "paged_kv_cache must be a PagedKVCache or a tuple (k, v) of arrays [n, p, kh, d] or [b, w, p, kh, d]; "
            f"got {type(paged_kv_cache).__name__}"
        )
    by_batch = not cache.combined and all(jnp.ndim(x) == 5 for x in cache.arrays)
    given = cache
    if by_batch:
        k, v = (x.reshape(-1, *x.shape[2:]) for x in cache.data)
        scales = cache.scales
        if scales is not None and scales.per_token:
            scales = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), scales)
        cache = PagedKVCache((k, v), cache.layout, scales)

    def back(cache: PagedKVCache) -> Any:
        if by_batch:
            cache = jax.tree.map(lambda new, old: new.reshape(jnp.shape(old)), cache, given)
        return cache.data if is_tuple else cache

    return cache, back
