"""The loading warpgroup: it fills the stages of shared memory with tiles of K and V, as the computing ones empty them.

A stage is `full` when its copies are there, `empty` when both computing warpgroups have read it. Tiles go from a work
item's last to its first, and on to the next item's. Queries have stages of their own, a unit's in each.

Units are short, a few tiles each, and the computing warpgroups must not wait at the beginning of one.

Keys and values of 8 bits take longer: they must be converted, by threads. So values have a further warpgroup.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn.kernels.mosaic import _converting, _private
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
        """Begins to load those of the r-th unit; rows int32 [128], EACH, of `row_of_thread`, for each warpgroup."""
        self.wait_empty(r)
        for i, index in enumerate(rows):
            wg.gather_rows(q_ref, self.tiles.at[self.stage(r), i], index)

    def end_load(self, r: jax.Array, wait: bool) -> None:
        """Says when they are there; with `wait` it waits, and makes them known to wgmma, as else whoever reads must."""
        if wait:
            wg.wait_copies()
            wg.fence()
            plgpu.barrier_arrive(self.full.at[self.stage(r)])
        else:
            _private.arrive_after_copies(self.full.at[self.stage(r)])


class Loader:
    """Loads the tiles of one unit after the other, also from a unit to the next."""

    def begin(self, first: Keys) -> Any:
        """Begins with the first unit, if it has tiles; returns what `unit` must know of it."""
        raise NotImplementedError

    def unit(self, keys: Keys, n: jax.Array, coming: Keys, begun: Any) -> Any:
        """What has not begun of the unit, and the beginning of the coming one; n tiles were loaded before the unit.

        begun: what `begin` or the call before this one returned. A coming unit without tiles is none.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class PairLoader(Loader):
    """Of keys and values, keys ahead of values.

    A unit's first keys come with the unit before it: the tensor cores wait for them, and not for its values.
    """

    k_ref: Any
    v_ref: Any
    k: Stages
    v: Stages


class BoxLoader(PairLoader):
    """By the copy engine: two warps start K's boxes, two V's."""

    def begin(self, first: Keys) -> None:
        boxes = first.source.boxes
        self._by_warps(boxes, lambda numbers: self._first_keys(first, jnp.int32(0), numbers))

    def unit(self, keys: Keys, n: jax.Array, coming: Keys, begun: None) -> None:
        tiles = keys.span.tiles

        def keys_of(numbers):
            self._stream(keys, n, False, numbers, self._ahead(keys), tiles)
            self._first_keys(coming, n + tiles, numbers)

        def values_of(numbers):
            self._stream(keys, n, True, numbers, 0, tiles)

        self._by_warps(keys.source.boxes, keys_of, values_of)

    def _ahead(self, keys: Keys) -> jax.Array:
        """As many keys as there is room for."""
        return jnp.minimum(keys.span.tiles, self.k.count)

    def _first_keys(self, keys: Keys, n: jax.Array, numbers: list[int]) -> None:
        self._stream(keys, n, False, numbers, 0, self._ahead(keys))

    def _by_warps(
        self, boxes: int, keys: Callable[..., None], values: Callable[..., None] | None = None
    ) -> None:
        """Calls each with the numbers of a warp's boxes, in the warps for K and for V."""
        half = WARPS // 2

        def warp(w):
            for part in range(half):
                numbers = [i for i in range(boxes) if i * half // boxes == part]
                if numbers:
                    pl.when(w == part)(functools.partial(keys, numbers))
                    if values is not None:
                        pl.when(w == half + part)(functools.partial(values, numbers))

        plgpu.warp_map(warp)

    def _stream(
        self, keys: Keys, n: jax.Array, value: bool, numbers: list[int], first: Any, end: Any
    ) -> None:
        """Tiles first .. end - 1, counted from the unit's last, their boxes with these numbers."""
        ref, stages = (self.v_ref, self.v) if value else (self.k_ref, self.k)
        tiles = keys.span.tiles

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


class RowLoader(PairLoader):
    """By the threads, each token's row by itself; keys are a tile ahead."""

    def begin(self, first: Keys) -> None:
        rows = self._rows(first, 0)
        # Copies that nobody waits for would reach the memory of the block after this one.
        pl.when(first.span.tiles > 0)(lambda: self._put(self.k_ref, self.k, jnp.int32(0), rows))

    def unit(self, keys: Keys, n: jax.Array, coming: Keys, begun: None) -> None:
        tiles = keys.span.tiles

        def tile(i, carry):
            before, rows = carry
            following = self._rows(keys, i + 1)
            self._put(self.k_ref, self.k, n + i, rows)
            self._put_value(keys, n + i - 1, before)
            return rows, following

        rows = self._rows(keys, 0), self._rows(keys, 1)
        first = self._rows(coming, 0)  # with theirs, the latency of its page ids passes
        last, _ = lax.fori_loop(1, tiles, tile, rows)
        pl.when(coming.span.tiles > 0)(lambda: self._put(self.k_ref, self.k, n + tiles, first))
        self._put_value(keys, n + tiles - 1, last)

    def _rows(self, keys: Keys, i: Any) -> jax.Array:
        return keys.rows(jnp.maximum(keys.span.tiles - 1 - i, 0))

    def _put(self, ref: Any, stages: Stages, n: jax.Array, rows: jax.Array) -> None:
        stages.wait_empty(n)
        stage = stages.stage(n)
        wg.gather_rows(ref, stages.tiles.at[stage], rows)
        _private.arrive_after_copies(stages.full.at[stage])

    def _put_value(self, keys: Keys, n: jax.Array, rows: jax.Array) -> None:
        value = keys.source.strides.value
        self._put(self.v_ref, self.v, n, jnp.where(rows < 0, -1, rows + value) if value else rows)


@dataclasses.dataclass(frozen=True)
class ConvertingLoader(Loader):
    """Of keys or of values, whose 8 bits become 16 on the way: while a tile is converted, its next one's bytes come."""

    ref: Any
    stages: Stages
    ring: Any  # of `_converting`, this warpgroup's
    value: bool
    scales: Any = None  # `TokenScales`, of keys and values, which come with keys

    def begin(self, first: Keys) -> Any:
        """The rows of the first unit's first tile, which have begun, and their scales."""
        rows = self._rows(first, 0)
        _converting.begin(self.ring, self.stages.tiles.shape[-2:], self.ref, rows)
        return rows, self._scales(first, rows)

    def unit(self, keys: Keys, n: jax.Array, coming: Keys, begun: Any) -> Any:
        """The rows of the coming unit's first tile, which have begun: as, before, those of this unit's had."""
        tiles = keys.span.tiles
        first = self._rows(coming, 0)

        def tile(i, carry):
            (rows, scales), following = carry
            later = self._rows(keys, i + 2)  # the latency of their page ids passes
            ends = jnp.broadcast_to(i + 1 == tiles, rows.shape)
            following = jnp.where(ends, first, following)
            coming = following, self._scales(keys, following)
            self._put(n + i, rows, scales, following)
            return coming, later

        return lax.fori_loop(0, tiles, tile, (begun, self._rows(keys, 1)))[0]

    def _put(self, n: jax.Array, rows: jax.Array, scales: Any, following: jax.Array) -> None:
        """The n-th tile, of these rows; those of the tile after it begin."""
        self.stages.wait_empty(n)
        stage = self.stages.stage(n)
        _converting.convert(self.ring, n, self.stages.tiles.at[stage], self.ref, rows, following)
        if self.scales is not None:
            self.scales.put(n, rows, scales)
        # Whoever multiplies makes it known to wgmma: to do so here would wait for the copies as well.
        plgpu.barrier_arrive(self.stages.full.at[stage])

    def _scales(self, keys: Keys, rows: jax.Array) -> Any:
        return None if self.scales is None else self.scales.load(keys.scale_rows(rows))

    def _rows(self, keys: Keys, i: Any) -> jax.Array:
        """Of the unit's i-th tile."""
        rows = keys.rows(jnp.maximum(keys.span.tiles - 1 - i, 0))
        value = keys.source.strides.value if self.value else 0
        return jnp.where(rows < 0, -1, rows + value) if value else rows
