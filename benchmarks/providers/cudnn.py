"""cuDNN's attention through `jax.nn.dot_product_attention`: whole prompts of one length, contiguous keys."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.cases import Attention, Case
from benchmarks.inputs import AttentionInputs
from benchmarks.timing import Call


def versions() -> dict[str, str]:
    return {}


def build(case: Case, inputs: Any) -> dict[str, Callable[[], Call]]:
    if not takes(case):
        return {}
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    return {"cudnn": lambda: dense_prefill(case, inputs, attend)}


def takes(case: Case) -> bool:
    """Whether kernels without lengths and page tables can run the case, on a GPU."""
    if not isinstance(case, Attention):
        return False
    dense = case.is_plain and case.page_size is None and case.is_dense
    return dense and jax.default_backend() == "gpu"


def dense_prefill(case: Case, x: AttentionInputs, attend: Callable[..., jax.Array]) -> Call:
    """`attend(q, k, v, is_causal=...)` on [b, t, heads, d] arrays."""
    assert isinstance(case, Attention)
    arrays = (x.q, *x.caches[0].arrays)
    q, k, v = (a.reshape(len(case.kv_lens), -1, *a.shape[-2:]) for a in arrays)

    @jax.jit
    def prefill(q, k, v):
        return attend(q, k, v, is_causal=case.causal).reshape(x.q.shape)

    return Call(lambda: (prefill(q, k, v),))
