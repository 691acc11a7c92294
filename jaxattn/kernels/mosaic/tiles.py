"""The tiles of the Hopper kernel, by head dim.

Taking turns and the way blocks share the work were measured (`benchmarks/results/h100_sweeps_mosaic.txt`). The rest is
what fits, not measured against others: shared memory holds, with the queries of two units (at 256 of one), four stages
of 128 keys at head_dim 64, two at 128, two of 64 keys at 256; and the three warpgroups' registers add up to at most 504
a thread of each. Of rows, a warpgroup for keys and one for values: four have 512. Over keys of 8 bits 208 and 216 for a
computing one are level, 200 is slower (`h200_sweeps_mosaic.txt`), and with 216 no loop of products spills. Products of
head_dim 256 do not compile for four, of which a thread has 128 registers at first.

Under a short window tiles are of 64 keys, as many bytes of them or three quarters, which is level (the same, 14.); but
keys of 8 bits are converted 128 at a time.
"""

import dataclasses

from jaxattn.plan import SHORT_WINDOW


@dataclasses.dataclass(frozen=True)
class Config:
    block_kv: int  # keys of a tile
    num_stages: int  # tiles of K and of V that are loaded ahead
    num_queries: int  # units whose queries are there at once
    turns: bool  # the two computing warpgroups take turns at the tensor cores
    registers: tuple[int, int]  # a thread of a computing warpgroup has, and of a loading one
    loaders: int  # warpgroups that load

    @property
    def short_kv(self) -> int:
        """Keys of a unit's last tile where so few are left: half, or 0 where wgmma's sums, of 64 at least, take all."""
        return self.block_kv // 2 if self.block_kv >= 128 else 0


def default_config(
    head_dim: int, width: int | None = None, *, rows: bool = False, narrow: bool = False
) -> Config:
    """width: `Visible.width`. rows: keys and values come row by row, by the threads; narrow: and are of 8 bits."""
    if head_dim > 128:
        return Config(64, 2, 1, True, (240, 24), 1)
    registers, loaders = ((216, 40), 2) if rows else ((232, 40), 1)
    block, stages = 128, 2 if head_dim > 64 else 4
    if width is not None and width <= SHORT_WINDOW and not narrow:
        block, stages = 64, 3 * stages // 2 if head_dim <= 64 else 2 * stages
    return Config(block, stages, 2, True, registers, loaders)
