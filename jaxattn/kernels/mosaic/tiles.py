"""The tiles of the Hopper kernel: a table by head dim. Figures: `benchmarks/results/h100_sweeps_mosaic.txt`."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    block_kv: int  # keys of a tile
    num_stages: int  # tiles of K and of V that are loaded ahead
    turns: bool  # the two computing warpgroups take turns at the tensor cores
    registers: tuple[int, int]  # a thread of a computing warpgroup has, and of the loading one


def default_config(head_dim: int) -> Config:
    if head_dim > 128:
        return Config(64, 2, True, (240, 24))
    return Config(128, 2, True, (232, 40))
