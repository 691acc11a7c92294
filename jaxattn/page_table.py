"""Which pages of a paged KV cache each request owns, and how many tokens it has: a page table in CSR form.

Request i owns pages `indices[indptr[i]:indptr[i + 1]]` in order, any page ids, shared pages allowed, and has
`last_page_len[i]` tokens in the last of them (1 <= last_page_len <= page_size; 0 for a request without pages).

Axes: b requests, t tokens, n pages, w pages of a block-table row.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxattn.as_program import as_program
from jaxattn.checks import (
    check_host_lengths,
    check_index,
    check_int32,
    check_positive,
    check_shape,
    copied_from_host,
    integer,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTable:
    """Which pages each request owns, in CSR form; a pytree of int32 arrays.

    Whatever the arrays hold, no request reaches a page that its own row does not name. A length beyond a request's
    pages, an entry outside `indices` and a page id outside the cache stand for tokens that are absent: attention does
    not see them, appending drops them. Where the arrays are on the host (NumPy), such contents are errors instead.

    Attributes:
      indptr: [b + 1], starts at 0, does not decrease. Request i owns `indices[indptr[i]:indptr[i + 1]]`.
      indices: [capacity], page ids in [0, num_pages); entries from `indptr[b]` on are unused.
      last_page_len: [b], tokens in the last page: 1 .. page_size, 0 for a request without pages.
      page_size: tokens a page (static). None where the arrays came without it: then the plan is told.
    """

    indptr: Array
    indices: Array
    last_page_len: Array
    page_size: int | None = dataclasses.field(default=None, metadata=dict(static=True))

    @classmethod
    def from_block_table(cls, block_table: Array, kv_len: Array, page_size: int) -> "PageTable":
        """A table from dense rows.

        Args:
          block_table: int32 [b, w], page ids of request i in `block_table[i, :ceil(kv_len[i] / page_size)]`;
            the rest of a row is ignored.
          kv_len: int32 [b], tokens of each request, at most w * page_size; tokens beyond are absent.
          page_size: tokens a page.

        Raises:
          ValueError: shapes that do not fit; lengths on the host that are negative or exceed a row's pages.
          TypeError: arrays that are not int32.
        """
        check_shape("block_table", block_table, ("b", "w"))
        check_int32("block_table", block_table)
        check_index("kv_len", kv_len, block_table.shape[0])
        page_size = integer("page_size", page_size)
        width = block_table.shape[1]
        if isinstance(kv_len, np.ndarray):
            check_host_lengths("kv_len", kv_len, width * page_size, f"{width} pages of {page_size}")
        rows = copied_from_host(block_table), copied_from_host(kv_len)
        return cls(*_of_rows(*rows, page_size), page_size)

    @classmethod
    def contiguous(cls, kv_len: Array, max_len: int, page_size: int) -> "PageTable":
        """The table where request i owns pages i * w to i * w + w - 1, w = ceil(max_len / page_size).

        Args:
          kv_len: int32 [b], tokens of each request, at most w * page_size; tokens beyond are absent.
          max_len: tokens that a request may have.
          page_size: tokens a page.

        Raises: as `from_block_table`.
        """
        max_len, page_size = integer("max_len", max_len), integer("page_size", page_size)
        check_index("kv_len", kv_len, "b")
        width = -(-max_len // page_size)
        pages = jnp.arange(kv_len.shape[0] * width, dtype=jnp.int32)
        return cls.from_block_table(pages.reshape(-1, width), kv_len, page_size)

    def to_block_table(self, max_pages: int) -> Array:
        """Dense rows int32 [b, max_pages]; entries past a request's pages are -1."""
        check_positive(max_pages=max_pages)
        column = jnp.arange(max_pages, dtype=jnp.int32)[None, :]
        first, count = self.rows()
        entry = first[:, None] + column
        owned = column < count[:, None]
        return jnp.where(owned, jnp.asarray(self.indices).at[entry].get(mode="clip"), -1)

    def check(self) -> None:
        """Raises ValueError or TypeError, with the reason, unless the arrays form a table.

        Contents are checked where they are on the host; those of device arrays are never read.
        """
        check_index("kv_indices", self.indices, "capacity")
        check_index("kv_last_page_len", self.last_page_len, "b")
        check_index("kv_indptr", self.indptr, self.batch_size + 1)
        if self.page_size is not None:
            check_positive(page_size=self.page_size)

    def with_page_size(self, page_size: int | None) -> "PageTable":
        """This table with its page size, from what the table or the argument says.

        Raises:
          ValueError: neither says it, or they differ.
        """
        if page_size is not None:
            page_size = integer("page_size", page_size)
        known = {x for x in (self.page_size, page_size) if x is not None}
        if len(known) != 1:
            raise ValueError(
                f"page_size must be that of the page table, {self.page_size}; got {page_size}"
                if known
                else "page_size must be given: this PageTable was made without it. Make it by "
                "PageTable.from_block_table or PageTable(indptr, indices, last_page_len, page_size)"
            )
        return dataclasses.replace(self, page_size=known.pop())

    def padded(self) -> "PageTable":
        """This table on the device, with at least one entry: kernels take no array without elements."""
        table = jax.tree.map(copied_from_host, self)
        if table.indices.size:
            return table
        return dataclasses.replace(table, indices=jnp.zeros(1, jnp.int32), indptr=table.indptr * 0)

    def rows(self) -> tuple[Array, Array]:
        """(first, count) int32 [b]: the entries of `indices` that each request owns, none outside of it."""
        indptr = jnp.clip(self.indptr, 0, self.indices.size)
        return indptr[:-1], jnp.maximum(indptr[1:] - indptr[:-1], 0)

    def kv_len(self, page_size: int | None = None) -> Array:
        """int32 [b]: tokens of each request, absent ones included; `rows` bounds those that have a page."""
        page_size = self.with_page_size(page_size).page_size
        assert page_size is not None
        _, count = self.rows()
        return jnp.where(count > 0, jnp.maximum((count - 1) * page_size + self.last_page_len, 0), 0)

    @property
    def batch_size(self) -> int:
        return self.last_page_len.shape[0]


@as_program("page_size")
def _of_rows(block_table: Array, kv_len: Array, page_size: int) -> tuple[Array, Array, Array]:
    """(indptr, indices, last_page_len), as `PageTable.from_block_table`."""
    width = block_table.shape[1]
    num_pages = jnp.clip(-(-kv_len // page_size), 0, width)
    indptr = jnp.pad(jnp.cumsum(num_pages, dtype=jnp.int32), (1, 0))
    column = jnp.arange(width, dtype=jnp.int32)[None, :]
    entry = jnp.where(column < num_pages[:, None], indptr[:-1, None] + column, block_table.size)
    indices = jnp.zeros(block_table.size, jnp.int32).at[entry].set(block_table, mode="drop")
    # Tokens beyond the row's pages still count: they say at which positions the last tokens stand.
    last_page_len = jnp.where(num_pages > 0, kv_len - (num_pages - 1) * page_size, 0)
    return indptr, indices, last_page_len


def get_seq_lens(kv_indptr: Array, kv_last_page_len: Array, page_size: int) -> Array:
    """Tokens of each request: `(pages - 1) * page_size + last_page_len`, 0 for a request without pages.

    Args:
      kv_indptr: int32 [b + 1].
      kv_last_page_len: int32 [b].
      page_size: tokens a page.

    Returns:
      int32 [b].
    """
    check_positive(page_size=page_size)
    num_pages = kv_indptr[1:] - kv_indptr[:-1]
    return jnp.where(num_pages > 0, (num_pages - 1) * page_size + kv_last_page_len, 0)


def get_batch_indices_positions(
    append_indptr: Array, seq_lens: Array, nnz: int
) -> tuple[Array, Array]:
    """For each appended token: its request, and its position in that request.

    The appended tokens are the last ones of their requests.

    Args:
      append_indptr: int32 [b + 1]; request i appends tokens `append_indptr[i]:append_indptr[i + 1]`.
      seq_lens: int32 [b], lengths after the append.
      nnz: capacity of the result; rows from `append_indptr[b]` on are padding.

    Returns:
      (batch_indices int32 [nnz], positions int32 [nnz]); a padding row has batch index -1 and position 0.

    Raises:
      ValueError, TypeError: arrays that are not int32, shapes that do not fit, an nnz that is no integer.
    """
    check_index("seq_lens", seq_lens, "b")
    check_index("append_indptr", append_indptr, seq_lens.shape[0] + 1)
    nnz = integer("nnz", nnz, least=0)
    return _batch_indices_positions(
        copied_from_host(append_indptr), copied_from_host(seq_lens), nnz
    )


@as_program("nnz")
def _batch_indices_positions(
    append_indptr: Array, seq_lens: Array, nnz: int
) -> tuple[Array, Array]:
    row = jnp.arange(nnz, dtype=jnp.int32)
    batch = jnp.searchsorted(append_indptr[1:], row, side="right").astype(jnp.int32)
    used = row < append_indptr[-1]
    position = row + (seq_lens - append_indptr[1:]).at[batch].get(mode="clip")
    return jnp.where(used, batch, -1), jnp.where(used, position, 0)
