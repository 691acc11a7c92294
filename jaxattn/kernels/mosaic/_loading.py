"""The loading warpgroup: it fills the stages of shared memory with tiles of K and V, as the computing ones empty them.

A stage is `full` when its copies are there, `empty` when both computing warpgroups have read it. Tiles go from a work
item's last to its first, and on to the next item's. Queries have stages of their own, a unit's in each.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn.kernels.mosaic import _private
from jaxattn.kernels.mosaic import _warpgroup as wg
from jaxattn.kernels.mosaic._keys import Keys

WARPS = 4


@dataclasses.dataclass(frozen=True)
class Stages:
    """Tiles [stages, k, d] of K or of V in shared memory, and their barriers."""

    tiles: Any
    full: Any
    empty: Any

    @property
    def count(self) -> int:
        return self.tiles.shape[0]

    def stage(self, n: jax.Array) -> jax.Array:
        """Where the n-th tile that this block loads lies."""
        return lax.rem(n, jnp.int32(self.count))

    def wait_empty(self, n: jax.Array) -> None:
        pl.when(n >= self.count)(lambda: plgpu.barrier_wait(self.empty.at[self.stage(n)]))


@dataclasses.dataclass(frozen=True)
class Queries(Stages):
    """Rows [stages, 2, r, d] of q in shared memory, those of a unit for each computing warpgroup, and their barriers.

    A warpgroup that has read its queries for the last time has their memory for its output.
    """

    def load(self, r: jax.Array, q_ref: Any, rows: Sequence[jax.Array]) -> None:
        """The queries of the r-th unit; rows int32 [128], EACH, of `row_of_thread`, for each warpgroup."""
        self.wait_empty(r)
        stage = self.stage(r)
        for i, index in enumerate(rows):
            wg.gather_rows(q_ref, self.tiles.at[stage, i], index)
        _private.arrive_after_copies(self.full.at[stage])


def load_boxes(
    keys: Keys, n: Any, refs: tuple[Any, Any], k: Stages, v: Stages, first: Any, end: Any
) -> None:
    """A work item's tiles first .. end - 1, counted from the last, by the copy engine: two warps start K's boxes, two V's.

    n tiles were loaded before the item's.
    """
    tiles = keys.span.tiles

    def stream(ref: Any, stages: Stages, value: bool, numbers: list[int]) -> None:
        def tile(i, pages):
            # Page ids are read a tile ahead.
            coming = keys.pages(tiles - 2 - i, numbers)
            stages.wait_empty(n + i)
            stage = stages.stage(n + i)
            for source, place in keys.boxes(ref, value, tiles - 1 - i, numbers, pages):
                plgpu.copy_gmem_to_smem(
                    source, stages.tiles.at[stage, place], stages.full.at[stage]
                )
            return coming

        lax.fori_loop(first, end, tile, keys.pages(tiles - 1 - first, numbers))

    boxes, half = keys.source.boxes, WARPS // 2

    def warp(w):
        for part in range(half):
            numbers = [i for i in range(boxes) if i * half // boxes == part]
            if numbers:
                load_k = functools.partial(stream, refs[0], k, False, numbers)
                load_v = functools.partial(stream, refs[1], v, True, numbers)
                pl.when(w == part)(load_k)
                pl.when(w == half + part)(load_v)

    plgpu.warp_map(warp)


def load_rows(
    keys: Keys, n: Any, refs: tuple[Any, Any], k: Stages, v: Stages, first: Any, end: Any
) -> None:
    """As `load_boxes`, by the threads, each token's row by itself; first < end."""
    tiles, value = keys.span.tiles, keys.source.strides.value

    def rows_of(i):
        return keys.rows(jnp.maximum(tiles - 1 - i, 0))

    def put(ref, stages, n, rows):
        stages.wait_empty(n)
        stage = stages.stage(n)
        wg.gather_rows(ref, stages.tiles.at[stage], rows)
        _private.arrive_after_copies(stages.full.at[stage])

    def put_value(n, rows):
        put(refs[1], v, n, jnp.where(rows < 0, -1, rows + value) if value else rows)

    def tile(i, carry):
        before, rows = carry
        coming = rows_of(i + 1)
        put(refs[0], k, n + i, rows)
        # A tile's keys are wanted a step before its values.
        put_value(n + i - 1, before)
        return rows, coming

    rows = rows_of(first)
    put(refs[0], k, n + first, rows)
    last, _ = lax.fori_loop(first + 1, end, tile, (rows, rows_of(first + 1)))
    put_value(n + end - 1, last)
