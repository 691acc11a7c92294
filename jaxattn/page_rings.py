"""Which pages a request gets, on the host: those of its whole context, or a ring of those that a window reaches.

In a layer whose tokens see `window` keys, a page that lies behind the window of every token to come is written anew:
page j of a request is page `j % ring` of the few that it owns. A plan reads no page behind the window, so what a block
table says of those may name a page that by now holds other tokens.

Axes: b requests, w pages of a block-table row.
"""

from collections.abc import Sequence

import numpy as np


def pages_of(length: int, page_size: int, window: int | None = None, at_once: int = 1) -> int:
    """Pages that a request of up to `length` tokens owns.

    Args:
      length: tokens, prompt and new ones.
      page_size: tokens a page.
      window: keys that a token sees, its own included; None: all before it.
      at_once: tokens that are appended before the first of them attends, at most.
    """
    whole = -(-length // page_size)
    if window is None:
        return whole
    # What the first of them sees and they themselves; they may begin at any slot of a page.
    reached = window - 1 + at_once
    return min(whole, (reached + page_size - 2) // page_size + 1)


def allocate_pages(
    lengths: Sequence[int],
    page_size: int,
    num_pages: int,
    *,
    max_pages: int,
    owned: Sequence[int] | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Pages for requests of up to `lengths` tokens, some of `num_pages` in permuted order.

    Args:
      lengths: tokens of each request at most.
      page_size: tokens a page.
      num_pages: of the cache.
      max_pages: w.
      owned: pages of each request, which it uses in turn; default: as many as its tokens fill.
      seed: of the order.

    Returns:
      A block table int32 [b, w] whose unused entries are -1.
    """
    counts = [pages_of(length, page_size) for length in lengths]
    owned = counts if owned is None else owned
    pages = np.random.default_rng(seed).permutation(num_pages)
    table = np.full((len(counts), max_pages), -1, np.int32)
    for row, count, own, end in zip(table, counts, owned, np.cumsum(owned), strict=True):
        if count:
            row[:count] = pages[end - own + np.arange(count) % own]
    return table
