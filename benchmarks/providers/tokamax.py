"""tokamax's attention, by its own choice of kernel: whole prompts of one length, contiguous keys."""

from collections.abc import Callable
from importlib import metadata
from typing import Any

import tokamax

from benchmarks.cases import Case
from benchmarks.providers.cudnn import dense_prefill, takes
from benchmarks.timing import Call


def versions() -> dict[str, str]:
    return {"tokamax": metadata.version("tokamax")}


def build(case: Case, inputs: Any) -> dict[str, Callable[[], Call]]:
    if not takes(case):
        return {}
    return {"tokamax": lambda: dense_prefill(case, inputs, tokamax.dot_product_attention)}
