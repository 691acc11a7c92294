"""What is measured: shapes and dtypes, each with a name of its own. Imports no JAX.

Lengths in a name are tokens: `b32_4k` is 32 requests of 4096. Attention has 32 query heads on 8 KV heads of 128 dims
(Llama-3 8B, Qwen3-8B) unless its name says otherwise; `tpN` is one of N tensor-parallel ranks.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

NUM_LAYERS = 32  # of a decode step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    op: str
    name: str
    dtype: str = "bfloat16"

    @property
    def id(self) -> str:
        """`op/name/dtype`, with the page size where there is one; no two cases share it."""
        page_size = getattr(self, "page_size", None)
        return "/".join([self.op, self.name, *([f"p{page_size}"] if page_size else []), self.dtype])

    @property
    def writes(self) -> bool:
        """Whether a call writes about as much as it reads: it then finds an L2 full of written lines (timing.py)."""
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cached(Case):
    """An op on a KV cache of `dtype`, or of `kv_dtype` with scales per "tensor", or per "token" and head."""

    kv_dtype: str | None = None
    kv_scales: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention(Cached):
    """op decode (one query token a request), decode_step (that in `num_layers` layers) or prefill.

    Query tokens are the last of their request's kv_len tokens; where not `causal`, each sees all of these. Of what it
    sees, a window leaves `window_left` keys and its own; with `tree`, mask bits say which of the new tokens it sees.
    """

    kv_lens: tuple[int, ...]
    qo_lens: tuple[int, ...]
    page_size: (
        int | None
    )  # None: contiguous keys; of decode, a dense cache [b, s, kh, d], its plan in the call
    num_qo_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    num_layers: int = 1
    causal: bool = True
    window_left: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    tree: bool = False

    @property
    def writes(self) -> bool:
        return False

    @property
    def is_plain(self) -> bool:
        """Whether it is plain softmax attention, all keys or causal, of one dtype."""
        special = self.soft_cap or self.sinks or self.tree or self.kv_dtype
        return self.window_left is None and not special

    @property
    def num_qo_tokens(self) -> int:
        return sum(self.qo_lens)

    @property
    def is_dense(self) -> bool:
        """Whether all requests are whole prompts of one length, as kernels without lengths need."""
        return self.qo_lens == self.kv_lens and len(set(self.kv_lens)) == 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(Case):
    """op plan_decode: from the page table to the work list of a decode step.

    This library's alone: FlashInfer plans on the host.
    """

    kv_lens: tuple[int, ...]
    page_size: int
    num_qo_heads: int = 32
    num_kv_heads: int = 8
    dtype: str = "int32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Append(Cached):
    """`new` tokens each of `batch` requests, the last of kv_len."""

    batch: int
    new: int
    kv_len: int
    page_size: int
    num_kv_heads: int = 8
    head_dim: int = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge(Case):
    states: int
    tokens: int
    num_qo_heads: int = 32
    head_dim: int = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm(Case):
    """op rmsnorm or fused_add_rmsnorm."""

    rows: int
    hidden: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouped(Case):
    """op grouped_matmul: `chosen` of the experts for each token, at random; each an [outs, size] matrix."""

    tokens: int
    chosen: int
    experts: int
    outs: int
    size: int
    apart: bool = False  # a row of x for each of a token's experts, not one for all

    @property
    def writes(self) -> bool:
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope(Case):
    tokens: int
    num_qo_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeAppend(Cached):
    """From a layer's projection to its attention: q and k normed if qk_norm, rotated, k and v appended.

    `new` tokens each of `batch` requests, the last of kv_len.
    """

    batch: int
    new: int
    kv_len: int
    page_size: int = 16
    num_qo_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    qk_norm: bool = False

    @property
    def num_tokens(self) -> int:
        return self.batch * self.new


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(Case):
    """op sampling: a token of each of `batch` rows, of probabilities, or of logits; None: without that limit.

    Logits are normal, with this standard deviation: 1 leaves a nucleus of half the vocabulary, 4 one of some tokens.
    """

    batch: int
    vocab: int
    logits: bool = False
    top_k: int | None = None
    top_p: float | None = None
    deviation: float = 1.0
    dtype: str = "float32"

    @property
    def writes(self) -> bool:
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activation(Case):
    """op silu_and_mul, gelu_and_mul or gelu_tanh_and_mul: rows of 2 * hidden."""

    tokens: int
    hidden: int = 14336


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop(Case):
    """op decode_loop: `steps` steps of a model, greedily, in one call, after kv_len tokens each; times are a step's."""

    batch: int
    kv_len: int
    steps: int
    num_layers: int
    hidden: int
    intermediate: int
    vocab: int
    page_size: int = 16
    num_qo_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    qk_norm: bool = False
    window: int | None = None  # keys that a token sees, in all layers but every `full_every`-th
    full_every: int = 1
    experts: int = (
        0  # gpt-oss's feed-forward, sinks and biases, with so many experts of `intermediate`
    )
    experts_per_token: int = 0
    gemma: bool = False  # norms before and after, of 1 + w; gelu; an embedding that is scaled, and the head as well

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer."""
        layers = range(1, self.num_layers + 1)
        return tuple(self.window if i % self.full_every else None for i in layers)


def _decode(name: str, batch: int, kv_len: int, page_size: int | None, **shape) -> Attention:
    lens = (kv_len,) * batch
    return Attention(
        op="decode", name=name, kv_lens=lens, qo_lens=(1,) * batch, page_size=page_size, **shape
    )


def _step(name: str, batch: int, kv_len: int, page_size: int | None = 16, **shape) -> Attention:
    case = _decode(name, batch, kv_len, page_size, **shape)
    return dataclasses.replace(case, op="decode_step", num_layers=NUM_LAYERS)


def _prefill(
    name: str, batch: int, qo_len: int, kv_len: int, page_size: int | None, **shape
) -> Attention:
    return Attention(
        op="prefill",
        name=name,
        kv_lens=(kv_len,) * batch,
        qo_lens=(qo_len,) * batch,
        page_size=page_size,
        **shape,
    )


def _append(name: str, batch: int, new: int, page_size: int, **cache: Any) -> Append:
    kv_len = max(new, 1024)
    shape: dict[str, Any] = dict(batch=batch, new=new, kv_len=kv_len, page_size=page_size)
    return Append(op="append", name=name, **shape, **cache)


def _rope_append(name: str, batch: int, new: int, **shape: Any) -> RopeAppend:
    kv_len = max(new, 1024)
    return RopeAppend(op="rope_append", name=name, batch=batch, new=new, kv_len=kv_len, **shape)


def _norms(rows: int, hidden: int, dtype: str = "bfloat16") -> list[Norm]:
    name = f"{rows}x{hidden}"
    ops = ("rmsnorm", "fused_add_rmsnorm")
    return [Norm(op=op, name=name, rows=rows, hidden=hidden, dtype=dtype) for op in ops]


def _samples(batch: int, vocab: int) -> list[Case]:
    limits: dict[str, dict[str, Any]] = {
        "plain": {},
        "top_p": dict(top_p=0.9),
        "top_k": dict(top_k=50),
        "top_k_top_p": dict(top_k=50, top_p=0.9),
        "peaked_top_p": dict(top_p=0.9, deviation=4.0),
        "logits": dict(logits=True),
        "logits_top_k_top_p": dict(logits=True, top_k=50, top_p=0.9),
    }
    return [
        Sample(op="sampling", name=f"{name}_{batch}x{vocab}", batch=batch, vocab=vocab, **how)
        for name, how in limits.items()
    ]


def _activations(tokens: int, **shape: Any) -> list[Case]:
    ops = ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")
    return [Activation(op=op, name=str(tokens), tokens=tokens, **shape) for op in ops]


def _full() -> list[Case]:
    cases: list[Case] = []

    lengths = {"b1_8k": (1, 8192), "b1_32k": (1, 32768), "b1_128k": (1, 131072)}
    lengths |= {"b8_4k": (8, 4096), "b32_4k": (32, 4096), "b128_2k": (128, 2048)}
    lengths |= {"b64_8k": (64, 8192)}
    for page_size in (1, 16):
        cases += [_decode(name, *shape, page_size) for name, shape in lengths.items()]
        skew = _decode("skew", 64, 1024, page_size)  # one long request among short ones
        cases.append(dataclasses.replace(skew, kv_lens=(65536,) + (1024,) * 63))
        cases.append(_decode("mha_b32_4k", 32, 4096, page_size, num_kv_heads=32))
        cases.append(_decode("mqa_b32_8k", 32, 8192, page_size, num_kv_heads=4))
        tp8 = dict(num_qo_heads=8, num_kv_heads=1)
        cases.append(_decode("70b_tp8_b64_4k", 64, 4096, page_size, **tp8))
    cases += [_decode(name, *lengths[name], 64) for name in ("b8_4k", "b32_4k", "b64_8k")]
    # The seed's profile: 32 requests of 64 pages of one token, 32 heads.
    cases += [
        _decode("seed_profile", 32, 64, 1, num_kv_heads=32, dtype=dtype)
        for dtype in ("bfloat16", "float16")
    ]
    cases += [
        _decode("70b_tp4_b64_4k", 64, 4096, 16, num_qo_heads=16, num_kv_heads=2),
        _decode("qwen3_32b_b32_4k", 32, 4096, 16, num_qo_heads=64),
        _decode("qwen3_235b_tp4_b64_4k", 64, 4096, 16, num_qo_heads=16, num_kv_heads=1),
        _decode("qwen2_7b_b32_4k", 32, 4096, 16, num_qo_heads=28, num_kv_heads=4),
        _decode("b32_4k", 32, 4096, 1, dtype="float16"),
        _decode("b32_4k", 32, 4096, 16, dtype="float16"),
        _decode("b32_4k", 32, 4096, 256),
        _decode("b32_4k_d64", 32, 4096, 16, head_dim=64),
        _decode("b32_4k_d256", 32, 4096, 16, head_dim=256),
        _decode("70b_tp8_b1_32k", 1, 32768, 16, num_qo_heads=8, num_kv_heads=1),
    ]

    cases += [_decode(f"{name}_b32_8k", 32, 8192, 16, **how) for name, how in _VARIANTS.items()]
    window: dict[str, Any] = dict(window_left=1023)
    for page_size in (1, 16, 64):
        cases.append(_decode("w1024_b32_32k", 32, 32768, page_size, **window))
        cases.append(_decode("b32_1k", 32, 1024, page_size))  # what a window of 1024 comes down to
    cases.append(_decode("cap50_b32_4k", 32, 4096, 16, soft_cap=50.0))
    cases.append(_decode("b32_4k", 32, 4096, None))

    cases.append(_decode("b128_2k", *lengths["b128_2k"], 64))
    for name in ("b1_8k", "b128_2k"):
        batch, kv_len = lengths[name]
        cases.append(Plan(op="plan_decode", name=name, kv_lens=(kv_len,) * batch, page_size=16))

    prompts = {"b1_4k": (1, 4096, 4096), "b1_16k": (1, 16384, 16384), "b4_4k": (4, 4096, 4096)}
    prompts |= {"b16_1k": (16, 1024, 1024)}
    appends = {"append_b8_128_8k": (8, 128, 8192), "spec_b32_4_4k": (32, 4, 4096)}
    appends |= {"chunk_512_32k": (1, 512, 32768)}
    appends |= {"append_b32_16_8k": (32, 16, 8192)}  # waits for memory
    for page_size in (1, 16):
        cases += [_prefill(name, *shape, page_size) for name, shape in (prompts | appends).items()]
    cases += [_prefill(name, *prompts[name], 64) for name in ("b1_16k", "b4_4k")]
    cases += [_prefill(name, *shape, None) for name, shape in prompts.items()]
    cases += [
        _prefill("b4_4k", *prompts["b4_4k"], 16, dtype="float16"),
        _prefill("70b_tp8_b4_4k", *prompts["b4_4k"], 16, num_qo_heads=8, num_kv_heads=1),
        _prefill("qwen3_32b_b4_4k", *prompts["b4_4k"], 16, num_qo_heads=64),
        _prefill("mha_b4_4k", *prompts["b4_4k"], 16, num_kv_heads=32),
        _prefill("mqa_b4_4k", *prompts["b4_4k"], 16, num_kv_heads=4),
        _prefill("b4_4k_d64", *prompts["b4_4k"], 16, head_dim=64),
        _prefill("b4_4k_d256", *prompts["b4_4k"], 16, head_dim=256),
        _prefill("b4_4k_full", *prompts["b4_4k"], 16, causal=False),
        _prefill("b1_512", 1, 512, 512, 16),
        _prefill("b4_512", 4, 512, 512, 16),
        # Few rows on many keys: split often, and much to merge.
        _prefill("append_b1_16_16k", 1, 16, 16384, 16),
        _prefill("append_b1_32_32k", 1, 32, 32768, 16),
        _prefill("append_b32_16_4k_d64", 32, 16, 4096, 16, head_dim=64),
        _prefill("append_b32_16_4k_d256", 32, 16, 4096, 16, head_dim=256),
    ]
    cases += [
        _prefill(f"{name}_b4_4k", *prompts["b4_4k"], 16, **how) for name, how in _VARIANTS.items()
    ]
    cases += [
        _prefill("b1_32k", 1, 32768, 32768, 16),
        _prefill("w1024_b1_32k", 1, 32768, 32768, 16, **window),
        _prefill("w1024_b4_4k", *prompts["b4_4k"], 16, **window),
        _prefill("w1024_chunk_512_32k", *appends["chunk_512_32k"], 16, **window),
        _prefill("cap50_b4_4k", *prompts["b4_4k"], 16, soft_cap=50.0),
        # Tree speculation: 16 and 64 drafted tokens, of which each sees some.
        _prefill("tree_b32_16_4k", 32, 16, 4096, 16, causal=False, tree=True),
        _prefill("tree_b8_64_4k", 8, 64, 4096, 16, causal=False, tree=True),
    ]
    # A chunk of one request's prompt and a token each of the others, in one call.
    mixed = _prefill("mixed", 64, 1, 4096, 16)
    lens: dict[str, Any] = dict(kv_lens=(8192, *mixed.kv_lens[1:]), qo_lens=(2048,) + (1,) * 63)
    cases.append(dataclasses.replace(mixed, **lens))

    cases += [_append(name, *shape, 16) for name, shape in _APPENDS.items()]
    cases += [_append("b1_4k", 1, 4096, 1), _append("b4_4k", 4, 4096, 1)]
    cases += [_append("b4_4k", 4, 4096, 64)]

    for states, tokens in ((2, 4096), (8, 32), (64, 32)):
        name = f"{states}_states_{tokens}"
        cases.append(Merge(op="merge_states", name=name, states=states, tokens=tokens))

    for rows in (1, 32, 128, 256, 4096, 16384):
        cases += _norms(rows, 4096)
    cases += _norms(8192, 8192) + _norms(4096, 5120)  # Llama-3 70B, Qwen3-32B
    cases += _norms(4096, 4096, "float16")  # the seed's profile
    for rows, hidden in ((262144, 111), (65536, 1024), (16384, 2560), (8192, 5120), (4096, 16384)):
        cases += _norms(rows, hidden)  # about as many bytes each
    cases += _norms(65536, 4096)  # so many that a launch's beginning and end count for little
    # Qwen3's norm of q and k: 4096 tokens of 40 heads.
    cases.append(Norm(op="rmsnorm", name="qk_163840x128", rows=163840, hidden=128))

    for tokens in (1, 32, 128, 256, 4096, 16384):
        cases.append(Rope(op="rope", name=str(tokens), tokens=tokens))
    cases += [
        Rope(op="rope", name="70b_tp8_4096", tokens=4096, num_qo_heads=8, num_kv_heads=1),
        Rope(op="rope", name="qwen3_32b_4096", tokens=4096, num_qo_heads=64),
        Rope(op="rope", name="16384", tokens=16384, dtype="float16"),
        Rope(op="rope", name="d64_16384", tokens=16384, head_dim=64),
        Rope(op="rope", name="d96_8192", tokens=8192, head_dim=96),
        Rope(op="rope", name="d256_8192", tokens=8192, num_qo_heads=16, head_dim=256),
    ]

    cases += [_rope_append(name, *shape) for name, shape in _APPENDS.items()]
    qwen3_32b: dict[str, Any] = dict(num_qo_heads=64, qk_norm=True)
    for name in ("b1_1", "b32_1", "b4_4k"):
        cases.append(_rope_append(f"qwen3_32b_{name}", *_APPENDS[name], **qwen3_32b))
    cases.append(_rope_append("70b_tp8_b64_1", 64, 1, num_qo_heads=8, num_kv_heads=1))

    gpt_oss: dict[str, Any] = dict(op="grouped_matmul", chosen=4, experts=32, size=2880)
    qwen3: dict[str, Any] = dict(op="grouped_matmul", chosen=8, experts=128, outs=1536, size=2048)
    for tokens in (1, 8, 32, 128, 512, 4096):
        cases.append(Grouped(name=f"gpt_oss_up_{tokens}", tokens=tokens, outs=5760, **gpt_oss))
        if tokens in (1, 32, 4096):
            down: dict[str, Any] = dict(outs=2880, apart=True)
            cases.append(Grouped(name=f"gpt_oss_down_{tokens}", tokens=tokens, **down, **gpt_oss))
            cases.append(Grouped(name=f"qwen3_30b_up_{tokens}", tokens=tokens, **qwen3))

    for batch, vocab in ((1, 128256), (32, 128256), (128, 151936)):
        cases += _samples(batch, vocab)

    for tokens in (1, 32, 256, 2048, 8192):
        cases += _activations(tokens)

    cases += [
        _step("b1_8k", 1, 8192),
        _step("b8_4k", 8, 4096),
        _step("b32_4k", 32, 4096),
        _step("b32_4k", 32, 4096, 1),
        _step("b32_4k", 32, 4096, None),
        _step("b128_2k", 128, 2048),
        _step("b1_2k", 1, 2048),
        _step("b8_2k", 8, 2048),
        _step("b32_2k", 32, 2048),
        _step("b8_8k", 8, 8192),
        _step("b8_32k", 8, 32768),
    ]
    models: dict[str, dict[str, Any]] = {
        "llama3_8b": dict(num_layers=NUM_LAYERS, intermediate=14336, vocab=128256),
        "qwen3_8b": dict(num_layers=36, intermediate=12288, vocab=151936, qk_norm=True),
    }
    # Of 62 layers as many as leave room for two copies of the cache on a GPU of 80 GB, whole rounds of five and one.
    models["gemma3_27b_30l"] = dict(
        num_layers=30, hidden=5376, intermediate=21504, vocab=262208, num_kv_heads=16, qk_norm=True,
        window=1024, full_every=6, gemma=True,
    )  # fmt: skip
    models["gpt_oss_20b"] = dict(
        num_layers=24, hidden=2880, intermediate=2880, vocab=201088, num_qo_heads=64, head_dim=64,
        window=128, full_every=2, experts=32, experts_per_token=4,
    )  # fmt: skip
    for name, model in models.items():
        cases.append(
            Loop(
                op="decode_loop",
                name=f"{name}_b32_4k",
                batch=32,
                kv_len=4096,
                steps=32,  # as `generate` takes at once
                **dict(hidden=4096) | model,
            )
        )

    for prefix, cache in _FP8.items():
        for page_size in (1, 16, 64):
            cases += [
                _decode(f"{prefix}_{name}", *lengths[name], page_size, **cache)
                for name in ("b64_8k", "b128_2k", "b32_4k")
            ]
            cases.append(_append(f"{prefix}_b4_4k", *_APPENDS["b4_4k"], page_size, **cache))
        for page_size in (1, 16):
            cases += [
                _prefill(f"{prefix}_{name}", *(prompts | appends)[name], page_size, **cache)
                for name in ("b4_4k", "chunk_512_32k")
            ]
        cases.append(_rope_append(f"{prefix}_b4_4k", *_APPENDS["b4_4k"], **cache))
    return cases


# The layers of models that plain attention does not compute.
_VARIANTS: dict[str, dict[str, Any]] = {
    "gpt_oss_local": dict(num_qo_heads=64, head_dim=64, window_left=127, sinks=True),
    "gpt_oss_global": dict(num_qo_heads=64, head_dim=64, sinks=True),
    "gpt_oss_local_no_sinks": dict(num_qo_heads=64, head_dim=64, window_left=127),
    "gemma3_27b_local": dict(num_kv_heads=16, window_left=1023),
    "gemma2_9b_global": dict(num_qo_heads=16, head_dim=256, soft_cap=50.0),
}
_FP8: dict[str, dict[str, Any]] = {
    "fp8": dict(kv_dtype="float8_e4m3fn", kv_scales="tensor"),
    "fp8_token": dict(kv_dtype="float8_e4m3fn", kv_scales="token"),
}
_APPENDS = {"b1_1": (1, 1), "b32_1": (32, 1), "b256_1": (256, 1), "b4_4k": (4, 4096)}


def _smoke() -> list[Case]:
    """One small case an op, for a CPU: lengths that fit no tile, and every kind of page."""
    heads: dict[str, Any] = dict(num_qo_heads=8, num_kv_heads=2)
    decode = _decode("ragged", 3, 1, 16, **heads)
    prefill = _prefill("ragged", 2, 1, 1, 1, **heads)
    return [
        dataclasses.replace(decode, kv_lens=(33, 1, 70)),
        dataclasses.replace(prefill, kv_lens=(40, 17), qo_lens=(5, 17)),
        _prefill("b2_32", 2, 32, 32, None, **heads),
        _prefill("b2_5_40_full", 2, 5, 40, 16, **heads, causal=False),
        _decode("b2_40", 2, 40, None, **heads),
        _decode("w8_b2_40", 2, 40, 16, **heads, window_left=8, soft_cap=5.0, sinks=True),
        _prefill("w8_b2_9_40", 2, 9, 40, 16, **heads, window_left=8, sinks=True),
        _prefill("tree_b2_5_40", 2, 5, 40, 16, **heads, causal=False, tree=True),
        _decode("fp8_b2_40", 2, 40, 16, **heads, **_FP8["fp8"]),
        _prefill("fp8_token_b2_9_40", 2, 9, 40, 16, **heads, **_FP8["fp8_token"]),
        _append("fp8_token_b2_3", 2, 3, 16, **_FP8["fp8_token"]),
        _rope_append("fp8_b2_3", 2, 3, **heads, **_FP8["fp8"]),
        Plan(op="plan_decode", name="ragged", kv_lens=(700, 1, 1500), page_size=16, **heads),
        _append("b2_3", 2, 3, 16),
        Merge(op="merge_states", name="3_states_5", states=3, tokens=5, num_qo_heads=4),
        *_norms(5, 256, "float16"),
        Rope(op="rope", name="5", tokens=5, num_qo_heads=4, num_kv_heads=2),
        Grouped(op="grouped_matmul", name="5", tokens=5, chosen=2, experts=6, outs=72, size=96),
        _rope_append("b2_3", 2, 3, **heads, qk_norm=True),
        *(case for case in _samples(3, 300) if "top_k_top_p" in case.name),
        *_activations(5, hidden=48),
        dataclasses.replace(_step("b2_40", 2, 40, **heads), num_layers=2),
        dataclasses.replace(_step("b2_40", 2, 40, None, **heads), num_layers=2),
        Loop(
            op="decode_loop",
            name="b2_40",
            batch=2,
            kv_len=40,
            steps=3,
            num_layers=2,
            hidden=128,
            intermediate=64,
            vocab=64,
            qk_norm=True,
            window=20,
            full_every=2,
            gemma=True,
            **heads,
        ),
        Loop(
            op="decode_loop",
            name="experts_b2_9",
            batch=2,
            kv_len=9,
            steps=2,
            num_layers=1,
            hidden=64,
            intermediate=32,
            vocab=64,
            experts=6,
            experts_per_token=2,
            **heads,
        ),
    ]


def select(
    *, smoke: bool = False, ops: Sequence[str] = (), names: Sequence[str] = ()
) -> list[Case]:
    """Cases of these ops whose id contains one of these names; empty: all.

    Raises:
      ValueError: an op that no case has, or nothing matches.
    """
    cases = _smoke() if smoke else _full()
    known = list(dict.fromkeys(case.op for case in cases))
    if unknown := set(ops) - set(known):
        raise ValueError(f"ops must be among {known}; got {sorted(unknown)}")
    chosen = [
        case
        for case in cases
        if (not ops or case.op in ops) and (not names or any(name in case.id for name in names))
    ]
    if not chosen:
        raise ValueError(f"no case matches {ops=}, {names=}")
    return chosen
