"""Bytes and floating-point operations that a case cannot do without: every roofline rests on these lines.

Bytes: each input read once, each output written once. Operations: the two matrix products of attention, over the
pairs (query, key) that the mask admits; the softmax is not counted. Other ops have no operations worth counting.
"""

import dataclasses

from benchmarks.cases import (
    Activation,
    Append,
    Attention,
    Case,
    Grouped,
    Loop,
    Merge,
    Norm,
    Plan,
    Rope,
    RopeAppend,
    Sample,
)
from jaxattn.work_list import WorkItem

ITEMSIZE = {"float8_e4m3fn": 1, "bfloat16": 2, "float16": 2, "float32": 4, "int32": 4}


@dataclasses.dataclass(frozen=True)
class Work:
    bytes: int
    flops: int | None
    model: str  # the formula, for readers of the results


def pairs(qo_len: int, kv_len: int, causal: bool = True, window_left: int | None = None) -> int:
    """(query, key) pairs of a request: query i of the last qo_len tokens sees all keys, or kv_len - qo_len + i + 1.

    With a window, window_left + 1 of these at most (causal ones: an encoder's windows have no case).
    """
    if window_left is not None:
        first = kv_len - qo_len
        return sum(min(first + i, window_left) + 1 for i in range(qo_len))
    if not causal:
        return qo_len * kv_len
    return qo_len * (kv_len - qo_len) + qo_len * (qo_len + 1) // 2


def keys_read(case: Attention) -> list[int]:
    """The keys of each request that any of its queries sees."""
    if case.window_left is None:
        return list(case.kv_lens)
    lens = zip(case.qo_lens, case.kv_lens)
    return [min(kv_len, qo_len + case.window_left) for qo_len, kv_len in lens]


def kv_bytes(case: Attention | Append | RopeAppend, tokens: int) -> int:
    """K and V of so many tokens in the case's cache, with their scales."""
    vectors = 2 * tokens * case.num_kv_heads
    scales = 4 * vectors if case.kv_scales == "token" else 0
    return vectors * case.head_dim * ITEMSIZE[case.kv_dtype or case.dtype] + scales


def work(case: Case) -> Work:
    """The work of one call of the case's op."""
    size = ITEMSIZE[case.dtype]
    match case:
        case Attention():
            q = case.num_qo_tokens * case.num_qo_heads * case.head_dim
            read = keys_read(case)
            pages = sum(-(-n // case.page_size) for n in read) if case.page_size else 0
            lens = zip(case.qo_lens, case.kv_lens)
            see = (case.causal, case.window_left)
            admitted = sum(pairs(qo_len, kv_len, *see) for qo_len, kv_len in lens)
            flops = 4 * case.head_dim * case.num_qo_heads * admitted
            per_layer = kv_bytes(case, sum(read)) + 2 * q * size + 4 * pages
            layers = f"{case.num_layers} layers x " if case.num_layers > 1 else ""
            return Work(
                per_layer * case.num_layers,
                flops * case.num_layers,
                f"{layers}(bytes: k + v + q + o + 4 per page id; "
                f"flops: 4 d h per {'causal ' if case.causal else ''}pair)",
            )
        case Plan():
            # How many items fill a GPU depends on the GPU; a request takes one at least.
            batch, fields = len(case.kv_lens), len(WorkItem._fields)
            return Work(
                (batch + 1 + batch + fields * batch) * size,
                None,
                f"bytes: indptr + last page lengths read + one item of {fields} int32 per request written",
            )
        case Append():
            tokens = case.batch * case.new
            return Work(
                2 * tokens * case.num_kv_heads * case.head_dim * size
                + kv_bytes(case, tokens)
                + 8 * tokens,
                None,
                "bytes: new k + v read and written + 8 per token of indices",
            )
        case Merge():
            rows = case.tokens * case.num_qo_heads
            return Work(
                rows * (case.states + 1) * (case.head_dim * size + 4),
                None,
                "bytes: states read + 1 written, each v + float32 lse",
            )
        case Norm():
            arrays = 2 if case.op == "rmsnorm" else 4
            return Work(
                (arrays * case.rows + 1) * case.hidden * size,
                None,
                f"bytes: {arrays} x rows x hidden + weight",
            )
        case Grouped():
            rows = case.tokens * case.chosen
            matrices = experts_read(case.experts, case.chosen, case.tokens) * case.outs
            operands = (matrices + (rows if case.apart else case.tokens)) * case.size
            return Work(
                round(operands * size) + 4 * rows * case.outs,
                2 * rows * case.outs * case.size,
                "bytes: x + the matrices that some row is expected to choose + float32 rows written",
            )
        case Rope():
            heads = case.num_qo_heads + case.num_kv_heads
            return Work(
                case.tokens * (2 * heads * case.head_dim * size + 4 * case.head_dim + 4),
                None,
                "bytes: q + k read and written + float32 table row and position per token",
            )
        case RopeAppend():
            heads = 2 * case.num_qo_heads + 2 * case.num_kv_heads
            return Work(
                case.num_tokens * (heads * case.head_dim * size + 4 * case.head_dim + 8)
                + kv_bytes(case, case.num_tokens),
                None,
                "bytes: q + k + v read and written + float32 table row and 8 of indices per token",
            )
        case Sample():
            return Work(
                case.batch * (case.vocab * size + 4), None, "bytes: rows read + a token of each"
            )
        case Activation():
            return Work(
                3 * case.tokens * case.hidden * size,
                None,
                "bytes: 2 x tokens x hidden read + 1 x tokens x hidden written",
            )
        case Loop():
            q, kv = case.num_qo_heads * case.head_dim, case.num_kv_heads * case.head_dim
            chosen, used = _feed_forwards(case)

            def weights(feed_forwards: float) -> float:
                inner = 3 * case.intermediate * feed_forwards + case.experts  # and a router
                matrices = case.hidden * (2 * q + 2 * kv + inner)
                return case.num_layers * matrices + case.vocab * case.hidden

            # On average over the steps; the first sees kv_len keys and its own, or a window of them.
            lengths = range(case.kv_len + 1, case.kv_len + case.steps + 1)
            seen = sum(min(n, window or n) for window in case.windows for n in lengths) / case.steps
            keys = case.batch * seen  # of all layers
            cached = (keys + case.num_layers * case.batch) * 2 * kv
            return Work(
                round((weights(chosen) + cached) * size),
                round(2 * case.batch * weights(used) + 4 * q * keys),
                "a step (bytes: weights, of experts those that some request is expected to choose, + k + v, read and "
                "appended; flops: 2 per weight and request, 4 d h per pair)",
            )
    raise TypeError(f"no work model for {type(case).__name__}")


def _feed_forwards(case: Loop) -> tuple[float, float]:
    """(feed-forwards of a layer that a step reads, those that a request goes through)."""
    if not case.experts:
        return 1, 1
    chosen = case.experts_per_token
    return experts_read(case.experts, chosen, case.batch), chosen


def experts_read(experts: int, chosen: int, tokens: int) -> float:
    """Of e experts those that some token chose, on average, where each of t tokens chooses k of them by itself.

    e (1 - (1 - k / e)^t), if each is as likely as another.
    """
    return experts * (1 - (1 - chosen / experts) ** tokens)
