"""The loading warpgroups fill the stages of shared memory with tiles of K and V, as the computing ones empty them.

A stage is `full` when its copies are there, `empty` when both computing warpgroups have read it. Tiles go from a work
item's last to its first, and on to the next item's. Queries have stages of their own, a unit's in each.

Units are short, a few tiles each, and the computing warpgroups must not wait at the beginning of one.

Where the threads themselves copy, row by row, values have a further warpgroup, so that neither waits for the other's
stages; but not at head_dim 256, where a fourth warpgroup would leave too few registers to compile with.
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
from jaxattn.kernels.mosaic._keys import Keys, KeySource

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

    def unit(
        self, keys: Keys, n: jax.Array, coming: Keys, begun: Any, between: Callable[[], None]
    ) -> Any:
        """What has not begun of the unit, and the beginning of the coming one; n tiles were loaded before the unit.

        begun: what `begin` or the call before this one returned. A coming unit without tiles is none. between: called
        when the unit's own tiles have begun.
        """
        raise NotImplementedError

    def end(self) -> None:
        """Waits for what no unit needed: copies that nobody waits for would reach the memory of the next block."""


@dataclasses.dataclass(frozen=True)
class BoxLoader(Loader):
    """Of keys and values, by the copy engine: two warps start K's boxes, two V's.

    A unit's first ones come with the unit before it, as many as there is room for: keys, for which the tensor cores
    wait, or also values.
    """

    k_ref: Any
    v_ref: Any
    k: Stages
    v: Stages
    scales: Any  # `TokenScales` in a line, which come with keys; or None
    values_first: bool  # values come ahead too

    def begin(self, first: Keys) -> None:
        self._first(first, jnp.int32(0))

    def unit(
        self, keys: Keys, n: jax.Array, coming: Keys, begun: None, between: Callable[[], None]
    ) -> None:
        tiles = keys.span.tiles
        begun_values = self._ahead(keys) if self.values_first else 0
        self._by_warps(
            keys.source.boxes,
            lambda numbers: self._stream(keys, n, False, numbers, self._ahead(keys), tiles),
            lambda numbers: self._stream(keys, n, True, numbers, begun_values, tiles),
        )
        between()
        self._first(coming, n + tiles)

    def _first(self, keys: Keys, n: jax.Array) -> None:
        def of(value):
            return lambda numbers: self._stream(keys, n, value, numbers, 0, self._ahead(keys))

        self._by_warps(keys.source.boxes, of(False), of(True) if self.values_first else None)

    def _ahead(self, keys: Keys) -> jax.Array:
        """Tiles that come with the unit before: as many as there is room for."""
        return jnp.minimum(keys.span.tiles, self.k.count)

    def _by_warps(
        self, boxes: int, keys: Callable[..., None], values: Callable[..., None] | None
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
            if self.scales is not None and not value and 0 in numbers:
                self.scales.copy(n + i, keys, tiles - 1 - i, stages.full.at[stage])
            return coming

        lax.fori_loop(first, end, tile, keys.pages(tiles - 1 - first, numbers))


@dataclasses.dataclass(frozen=True)
class RowLoader(Loader):
    """Of keys or of values, by the threads, each token's row by itself; a unit's first tile with the unit before it."""

    ref: Any
    stages: Stages
    shift: int  # rows from a key to what is loaded of its token

    def begin(self, first: Keys) -> jax.Array:
        """The rows of the first unit's second tile."""
        self.put_first(first, jnp.int32(0), self.rows(first, 0))
        return self.rows(first, 1)

    def unit(
        self, keys: Keys, n: jax.Array, coming: Keys, begun: jax.Array, between: Callable[[], None]
    ) -> jax.Array:
        """The rows of the coming unit's second tile, whose first one is under way, as were this unit's."""
        tiles = keys.span.tiles
        first = self.rows(coming, 0)  # the latency of its page ids passes

        def tile(i, rows):
            following = self.rows(keys, i + 1)
            self.put(n + i, rows)
            return following

        lax.fori_loop(1, tiles, tile, begun)
        between()
        second = self.rows(coming, 1)
        self.put_first(coming, n + tiles, first)
        return second

    def rows(self, keys: Keys, i: Any) -> jax.Array:
        """The keys' of the unit's i-th tile, -1 where there are none."""
        return keys.rows(jnp.maximum(keys.span.tiles - 1 - i, 0))

    def own(self, rows: jax.Array) -> jax.Array:
        """Where what is loaded of these keys' tokens lies."""
        return jnp.where(rows < 0, -1, rows + self.shift) if self.shift else rows

    def put_first(self, keys: Keys, n: jax.Array, rows: jax.Array) -> None:
        # Copies that nobody waits for would reach the memory of the block after this one.
        pl.when(keys.span.tiles > 0)(lambda: self.put(n, rows))

    def put(self, n: jax.Array, rows: jax.Array) -> None:
        """Begins to load the n-th tile, when there is room."""
        self.stages.wait_empty(n)
        stage = self.stages.stage(n)
        wg.gather_rows(self.ref, self.stages.tiles.at[stage], self.own(rows))
        _private.arrive_after_copies(self.stages.full.at[stage])


@dataclasses.dataclass(frozen=True)
class RowPairLoader(Loader):
    """Of keys and values by one warpgroup, keys a tile ahead."""

    k: RowLoader
    v: RowLoader

    def begin(self, first: Keys) -> None:
        self.k.put_first(first, jnp.int32(0), self.k.rows(first, 0))

    def unit(
        self, keys: Keys, n: jax.Array, coming: Keys, begun: None, between: Callable[[], None]
    ) -> None:
        tiles = keys.span.tiles

        def tile(i, carry):
            before, rows = carry
            following = self.k.rows(keys, i + 1)
            self.k.put(n + i, rows)
            self.v.put(n + i - 1, before)
            return rows, following

        rows = self.k.rows(keys, 0), self.k.rows(keys, 1)
        first = self.k.rows(coming, 0)
        last, _ = lax.fori_loop(1, tiles, tile, rows)
        between()
        self.k.put_first(coming, n + tiles, first)
        self.v.put(n + tiles - 1, last)


@dataclasses.dataclass(frozen=True)
class ConvertingLoader(RowLoader):
    """As `RowLoader`, of 8 bits, which become 16 on the way: while a tile is converted, its next one's bytes come."""

    ring: Any  # of `_converting`, this warpgroup's
    scales: Any = None  # `TokenScales`, of keys and values, which come with keys

    def begin(self, first: Keys) -> Any:
        """The keys' rows of the first unit's first tile, which have begun, and their scales."""
        rows = self.rows(first, 0)
        _converting.begin(self.ring, self.stages.tiles.shape[-2:], self.ref, self.own(rows))
        return rows, self._scales(first, rows)

    def unit(
        self, keys: Keys, n: jax.Array, coming: Keys, begun: Any, between: Callable[[], None]
    ) -> Any:
        """The rows of the coming unit's first tile, which have begun: as, before, those of this unit's had."""
        tiles = keys.span.tiles
        first = self.rows(coming, 0)

        def tile(i, carry):
            (rows, scales), following = carry
            later = self.rows(keys, i + 2)  # the latency of their page ids passes
            ends = jnp.broadcast_to(i + 1 == tiles, rows.shape)
            following = jnp.where(ends, first, following)
            coming = following, self._scales(keys, following)
            self._convert(n + i, rows, scales, following)
            return coming, later

        begun, _ = lax.fori_loop(0, tiles, tile, (begun, self.rows(keys, 1)))
        between()
        return begun

    def end(self) -> None:
        wg.wait_copies()

    def _convert(self, n: jax.Array, rows: jax.Array, scales: Any, following: jax.Array) -> None:
        """The n-th tile, of these keys; those of the tile after it begin."""
        self.stages.wait_empty(n)
        stage = self.stages.stage(n)
        coming = self.own(following)
        tile = self.stages.tiles.at[stage]
        _converting.convert(self.ring, n, tile, self.ref, self.own(rows), coming)
        if self.scales is not None:
            self.scales.put(n, rows, scales)
        # Whoever multiplies makes it known to wgmma: to do so here would wait for the copies as well.
        plgpu.barrier_arrive(self.stages.full.at[stage])

    def _scales(self, keys: Keys, rows: jax.Array) -> Any:
        return None if self.scales is None else self.scales.load(keys.scale_rows(rows))


def loaders(
    source: KeySource,
    count: int,
    k_ref: Any,
    v_ref: Any,
    k: Stages,
    v: Stages,
    rings: Any,
    scales: Any,
    values_first: bool,
) -> tuple[Loader, ...]:
    """For each of so many loading warpgroups, as `Config.loaders` says.

    rings: of `_converting`, for K and for V; scales: `TokenScales`, or None; values_first: of a `BoxLoader`.
    """
    if source.in_boxes:
        return (BoxLoader(k_ref, v_ref, k, v, scales, values_first),)
    shift = source.strides.value
    if source.narrow:
        return (
            ConvertingLoader(k_ref, k, 0, rings.at[0], scales),
            ConvertingLoader(v_ref, v, shift, rings.at[1]),
        )
    pair = RowLoader(k_ref, k, 0), RowLoader(v_ref, v, shift)
    return pair if count == 2 else (RowPairLoader(*pair),)
