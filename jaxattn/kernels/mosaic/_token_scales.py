"""Scales of each token and head, beside the tile of keys that they belong to, in shared memory.

    x_ij = k_scale_j s_ij,   o_i = sum_j exp(x_ij) v_scale_j v_j / sum_j exp(x_ij)

A weight times its scale may be far outside of float16, in which it is multiplied. So log2(v_scale) is added to its
exponent before a row's largest is found, and the sum of weights takes it out again: as in Triton's kernel.

A token that is not there has a scale of 0, whose logarithm gives every row a weight of 0: it needs no mask.

Scales are finite. One that is not makes NaN of what sees its token, and of nothing else. (In the reference an infinite
v_scale gives infinities, and lse does not know v_scale.)
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxattn.kernels.mosaic import _warpgroup as wg
from jaxattn.kernels.mosaic._elements import KEY
from jaxattn.kernels.mosaic._loading import Stages
from jaxattn.kv_scales import columns


class Columns(NamedTuple):
    """Of the keys of a tile, float32 [k], KEY."""

    k: jax.Array  # what scores are to be multiplied by
    log_v: jax.Array  # what is to be added to exponents of 2
    per_v: jax.Array  # what weights are to be multiplied by in their sum


@dataclasses.dataclass(frozen=True)
class TokenScales(Stages):
    """`Columns` float32 [stages, 3, k] in shared memory: full when their keys are, empty after the softmax."""

    k_ref: Any  # float32 [num_rows], in device memory; or a line [3, kh, c] of `columns` of both
    v_ref: Any

    def load(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """By the loading warpgroup: the scales of tokens int32 [128], EACH; anything where there is none, of -1."""
        rows = jnp.maximum(rows, 0)
        return wg.load_each(self.k_ref, rows), wg.load_each(self.v_ref, rows)

    def put(self, n: jax.Array, rows: jax.Array, scales: tuple[jax.Array, jax.Array]) -> None:
        """Those of the n-th tile, for whoever is told that its keys are there."""
        self.wait_empty(n)
        stage = self.stage(n)
        for i, column in enumerate(columns(*scales, rows >= 0)):
            self.tiles[stage, i] = column

    def copy(self, n: jax.Array, keys: Any, j: jax.Array, full: Any) -> None:
        """Begins to load those of the n-th tile, tile j of its unit, from a line of `columns`, by the copy engine."""
        self.wait_empty(n)
        place = self.k_ref.at[:, keys.head, keys.tokens(j)]
        plgpu.copy_gmem_to_smem(place, self.tiles.at[self.stage(n)], full)

    def columns(self, n: jax.Array, keys: int) -> Columns:
        """By a computing warpgroup: of the first keys of the n-th tile."""
        tile = self.tiles.at[self.stage(n)]
        parts = (tile.at[i, pl.ds(0, keys)] for i in range(len(Columns._fields)))
        return Columns(*(plgpu.load(part, layout=KEY, optimized=False) for part in parts))
