"""The Hopper lowering: what it serves, its arithmetic, and on a GPU the same data and oracle as Triton's."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_lse, device_array, i32, make_paged, same_bits, with_scales
from test_attention import check_prefill
from test_fp8 import extremes, long_tail, wild
from test_variants import check
from variants import Variant

import jaxattn as ja
from jaxattn.kernels.mosaic import serves
from jaxattn.kernels.mosaic.serves import why_not_attention
from jaxattn.spec import Visible
from jaxattn.work_list import WorkItem

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
JAX_0_11 = jax.__version_info__[:2] == (0, 11)
KV_LENS, QO_LENS = [130, 1, 0, 300, 1000, 64, 257], [130, 1, 0, 257, 300, 64, 128]
# So few multiprocessors to fill that tiles are of 128 rows and yet some are split.
FEW_SMS = dict(num_sms=8)


def plan_of(qo_len=2048, heads=(8, 2), **how):
    """What a plan is of: its arrays are shapes, for what reads none."""

    def plan():
        table = ja.PageTable.from_block_table(i32([list(range(128))]), i32([2048]), 16)
        return ja.plan_prefill(
            i32([0, qo_len]),
            table,
            num_qo_tokens=qo_len,
            num_qo_heads=heads[0],
            num_kv_heads=heads[1],
            **dict(disable_split_kv=True) | how,
        )

    return jax.eval_shape(plan)


def reason(dtype=jnp.bfloat16, d=128, dv=128, kv_dtype=None, plan=None, **how):
    how = dict(score_mods=False, out_dtype=dtype) | how
    values = jax.ShapeDtypeStruct((128, 16, 2, dv), kv_dtype or dtype)
    return why_not_attention(jnp.zeros((2048, 8, d), dtype), values, plan or plan_of(), **how)


def test_what_it_does_not_serve_has_a_reason(monkeypatch):
    monkeypatch.setattr(serves, "why_not", lambda: None)
    assert reason() is None
    assert "float32" in reason(dtype=jnp.float32)
    assert "96" in reason(d=96, dv=96)
    assert "128 and 64" in reason(dv=64)
    assert "float32" in reason(kv_dtype=jnp.float32)
    assert reason(kv_dtype=E4M3) is None
    assert reason(kv_dtype=E5M2, d=256, dv=256) is None
    assert "64, 128" in reason(kv_dtype=E5M2, d=256, dv=256, plan=plan_of(qo_len=64))
    assert "out_dtype" in reason(out_dtype=jnp.float32)
    assert "score_mod" in reason(score_mods=True)
    spans = jnp.full((2048, 2), -1, jnp.int32)
    assert "spans" in reason(plan=plan_of(bidirectional_spans=spans))
    mask = ja.MaskBits(jnp.zeros(2048 * 256, jnp.uint8), i32([0, 2048 * 256]))
    assert "masks" in reason(plan=plan_of(mask=mask))
    assert "128 rows" in reason(plan=plan_of(qo_len=4, disable_split_kv=False))


@pytest.mark.parametrize("version", [(0, 10, 2), (0, 12, 0)])
def test_it_is_for_one_version_of_jax(monkeypatch, version):
    monkeypatch.setattr(serves, "has_wgmma", lambda: True)
    monkeypatch.setattr(jax, "__version_info__", version)
    assert "JAX 0.11" in reason()


def test_asked_for_where_it_cannot_run():
    cache = ja.PagedKVCache.zeros(128, 16, 2, 128, jnp.float32)
    q = jnp.zeros((2048, 8, 128), jnp.float32)
    with pytest.raises(ValueError, match="backend='mosaic' cannot serve this call: it"):
        ja.paged_prefill(q, cache, plan_of(), backend="mosaic")
    with pytest.raises(ValueError, match="this op has no such kernel"):
        ja.rmsnorm(jnp.zeros((2, 128)), jnp.ones(128), backend="mosaic")


@pytest.mark.skipif(not JAX_0_11, reason="the lowering's modules are those of JAX 0.11")
@pytest.mark.parametrize(
    "units, head_dim, page_size, window, queries, draw",
    [
        (30, 128, 16, None, True, True),
        (6, 128, 16, None, True, False),  # so few that blocks would not share the last ones fairly
        (30, 128, 16, 1023, True, True),
        (30, 128, 16, 127, False, False),  # a unit is one tile or two
        (30, 128, 1, None, True, False),  # rows: one tile is under way
        (30, 256, 16, None, False, False),  # room for one unit's queries
    ],
)
def test_what_is_done_ahead(units, head_dim, page_size, window, queries, draw):
    from jaxattn.kernels.mosaic._keys import KeySource
    from jaxattn.kernels.mosaic._units import Ahead
    from jaxattn.kernels.mosaic.tiles import default_config

    visible = Visible.of(True, window)
    block = default_config(head_dim, visible.width).block_kv
    source = KeySource("NHD", page_size, 1000, False, None, block)
    config = default_config(head_dim, visible.width, rows=not source.in_boxes)
    ahead = Ahead.of(units, source, config, visible)
    assert ahead == Ahead(queries, draw)


@pytest.mark.skipif(not JAX_0_11, reason="the lowering's modules are those of JAX 0.11")
@pytest.mark.parametrize(
    "visible", [(None, 0), (None, None), (100, 0), (7, 0), (300, 200), (64, 64)]
)
@pytest.mark.parametrize("kind", ["pages", "contiguous", "in line 1", "in line 4", "in line 16"])
def test_tiles_cover_what_is_seen_and_plain_ones_hide_nothing(visible, kind):
    """Every key that a row sees lies in a tile; a tile without a mask is one that all rows see whole."""
    from jaxattn.kernels.mosaic._keys import KeySource
    from jaxattn.kernels.mosaic._units import Ahead, Phases, Statics
    from jaxattn.kernels.mosaic.tiles import default_config
    from jaxattn.spec import AttentionSpec, Score

    visible, group, block = Visible(*visible), 4, 128
    rng = np.random.default_rng(0)
    paged, in_line = kind != "contiguous", kind.startswith("in line")
    page_size = int(kind.split()[-1]) if in_line else 16
    source = KeySource("NHD", page_size, 1000, False, None, block, in_line=in_line)
    if not paged:
        source = KeySource.contiguous(4096, 2, "NHD", block)
    spec = AttentionSpec(8, 2, visible)
    static = Statics(spec, Score(1.0), source, default_config(128), 1, True, Ahead(False, False))
    for kv_len, qo_len in [(1, 1), (130, 130), (1000, 300), (1024, 64), (517, 33), (128, 128)]:
        token = int(rng.integers(0, qo_len)) // 32 * 32
        rows = min(128, (qo_len - token) * group)
        first, last = (token + kv_len - qo_len + x for x in (0, (rows - 1) // group))
        begin, end = (int(x) for x in visible.some(i32(first), i32(last), i32(kv_len)))
        begin = begin // page_size * page_size if paged else begin
        start = int(rng.integers(0, 50))
        item = WorkItem(
            *map(
                i32,
                (
                    token * group,
                    token * group + rows,
                    kv_len - qo_len,
                    start,
                    begin,
                    end,
                    0,
                    1,
                    0,
                    kv_len,
                ),
            )
        )
        seen = visible.begin(i32(first))
        span = source.span(item, seen, (i32(0), i32(999)) if paged else None)
        assert int(span.begin) == max(begin, int(seen))
        short, plain, low = phases = Phases.of(static, item, span)
        tiles, origin = int(span.tiles), int(span.origin)
        # A short last tile holds all keys that are left, and the next tile is not masked.
        few = end - origin - (tiles - 1) * block <= block // 2
        assert int(short) == (few and int(plain) == 1 < int(low))
        done = [i for ends in phases.ranges(tiles) for i in range(*map(int, ends))]
        assert sorted([*range(1 + int(short)), *done]) == list(range(tiles))
        assert origin <= begin and origin + tiles * block >= end
        assert 1 <= int(plain) <= int(low)
        if source.by_page:
            assert origin == max(begin, 0)
        else:
            assert (start * (page_size if in_line else 1) + origin) % 8 == 0
            assert source.may_begin_early or origin == begin
        for i in range(int(plain), min(int(low), tiles)):
            keys = origin + (tiles - 1 - i) * block
            for position in (first, last):
                assert visible.begin(i32(position)) <= keys
                assert visible.end(i32(position), i32(kv_len)) >= keys + block
            assert begin <= keys


@pytest.mark.skipif(not JAX_0_11, reason="the lowering is JAX 0.11's")
@pytest.mark.parametrize("page_size, kv_dtype", [(1, jnp.bfloat16), (16, jnp.bfloat16), (1, E5M2)])
def test_it_is_the_default_on_hopper(page_size, kv_dtype):
    """That of pages of one token is lowered as well, which takes ten seconds: it needs what is private of JAX's, a
    barrier that counts copies. CI's compile report compiles the others. Two layers have one kernel.
    """
    mesh = jax.sharding.AbstractMesh(
        (1,),
        ("x",),
        abstract_device=jax.sharding.AbstractDevice(
            device_kind="NVIDIA H200", num_cores=None, platform="gpu"
        ),
    )
    scales = None if kv_dtype == jnp.bfloat16 else ja.KVScales.of(0.5, [1.0, 2.0])
    cache = jax.eval_shape(
        lambda: ja.PagedKVCache.zeros(2048 // page_size, page_size, 2, 128, kv_dtype, scales=scales)
    )

    def prefill(q, cache, block_table, backend=None):
        table = ja.PageTable.from_block_table(block_table, i32([2048]), page_size)
        plan = ja.plan_prefill(
            i32([0, 2048]), table, num_qo_tokens=2048, num_qo_heads=8, num_kv_heads=2
        )
        q = 2 * q  # of the mesh, as what the first layer returns
        for _ in range(2):
            q = ja.paged_prefill(q, cache, plan, backend=backend)
        return q

    args = (
        jax.ShapeDtypeStruct((2048, 8, 128), jnp.bfloat16),
        cache,
        jax.ShapeDtypeStruct((1, 2048 // page_size), jnp.int32),
    )
    for backend in (None, "triton"):
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(prefill, static_argnames="backend").trace(*args, backend=backend)
            assert ("wgmma" in str(traced.jaxpr)) == (backend is None)
            if kv_dtype == E5M2:
                text = traced.lower(lowering_platforms=("cuda",)).as_text()
                kernel = "@mosaic_gpu" if backend is None else "@__gpu$xla.gpu.triton"
                assert text.count(kernel) == 1


def sharded_prefill(mesh):
    """A prefill whose requests and heads lie on the axes of a mesh, and its arguments' shapes; every array varies."""
    spec = jax.sharding.PartitionSpec

    def prefill(q, k, v, block_table, kv_len, sinks):
        table = ja.PageTable.from_block_table(block_table, kv_len, 16)
        tokens = q.shape[0]
        plan = ja.plan_prefill(
            i32([0, tokens]), table, num_qo_tokens=tokens, num_qo_heads=q.shape[1], num_kv_heads=2
        )
        cache = ja.PagedKVCache((k, v))
        return ja.paged_prefill(q, cache, plan, sinks=sinks, return_lse=True)

    pool = spec("dp", None, "tp")
    fn = jax.shard_map(
        prefill,
        mesh=mesh,
        in_specs=(spec("dp", "tp"), pool, pool, spec("dp"), spec("dp"), spec("tp")),
        out_specs=(spec("dp", "tp"), spec("dp", "tp")),
    )
    dp, tp = mesh.axis_sizes
    cache = jax.ShapeDtypeStruct((dp * 128, 16, tp * 2, 128), jnp.bfloat16)
    return fn, (
        jax.ShapeDtypeStruct((dp * 2048, tp * 8, 128), jnp.bfloat16),
        cache,
        cache,
        jax.ShapeDtypeStruct((dp, 128), jnp.int32),
        jax.ShapeDtypeStruct((dp,), jnp.int32),
        jax.ShapeDtypeStruct((tp * 8,), jnp.float32),
    )


@pytest.mark.skipif(not JAX_0_11, reason="the lowering is JAX 0.11's")
def test_lowers_under_shard_map():
    mesh = jax.sharding.AbstractMesh(
        (2, 2),
        ("dp", "tp"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        abstract_device=jax.sharding.AbstractDevice(
            device_kind="NVIDIA H200", num_cores=None, platform="gpu"
        ),
    )
    fn, args = sharded_prefill(mesh)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def on_hopper():
    return serves.why_not() is None


@pytest.fixture
def hopper():
    if not on_hopper():
        pytest.skip(f"the Hopper kernel does not run here: {serves.why_not()}")


GPU_CASES = [
    # page_size, kh, group, head_dim, dtype, layout, combined
    *[(p, 2, 4, 128, jnp.bfloat16, "NHD", False) for p in (1, 4, 5, 8, 16, 64, 128, 256)],
    *[(p, 2, 4, 128, jnp.bfloat16, "HND", False) for p in (1, 16, 256)],
    *[
        (p, 2, 4, 128, jnp.bfloat16, *how)
        for p in (1, 16, 256)
        for how in (("NHD", True), ("HND", True))
    ],
    *[(16, 3, g, 128, jnp.bfloat16, "NHD", False) for g in (1, 3, 5, 7, 8, 16, 71)],
    *[(p, 2, 4, d, jnp.bfloat16, "NHD", False) for p in (1, 16, 64) for d in (64, 256)],
    (16, 2, 4, 128, jnp.float16, "NHD", False),
    (1, 2, 4, 64, jnp.float16, "HND", True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("page_size, kh, group, head_dim, dtype, layout, combined", GPU_CASES)
def test_paged_prefill_gpu(hopper, page_size, kh, group, head_dim, dtype, layout, combined):
    paged = make_paged(
        KV_LENS,
        page_size=page_size,
        num_kv_heads=kh,
        head_dim=head_dim,
        dtype=dtype,
        layout=layout,
        combined=combined,
    )
    how = dict(group=group, backend="mosaic", **FEW_SMS)
    check_prefill(paged, QO_LENS, dtype, causal=True, **how)
    if page_size == 16:  # without a mask, one size is enough
        check_prefill(paged, QO_LENS, dtype, causal=False, **how)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kv_lens, qo_lens, splits",
    [
        ([9000], [300], dict(num_sms=16)),  # one request in many splits
        ([3000, 2000], [600, 500], dict(num_sms=None)),
        ([700, 33, 0, 900] * 10, [40, 33, 0, 100] * 10, dict(num_sms=None)),  # many units a block
        (KV_LENS, QO_LENS, dict(disable_split_kv=True)),
        (KV_LENS, QO_LENS, dict(fixed_split_size=128)),
    ],
)
@pytest.mark.parametrize("page_size", [1, 16])
def test_splits_and_schedules_gpu(hopper, kv_lens, qo_lens, splits, page_size):
    if "fixed_split_size" in splits:
        splits = dict(fixed_split_size=128 // page_size)
    paged = make_paged(kv_lens, page_size=page_size, num_kv_heads=8, head_dim=128)
    check_prefill(paged, qo_lens, jnp.bfloat16, group=4, backend="mosaic", causal=True, **splits)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize(
    "variant", [Variant(causal=True), Variant(), Variant(causal=True, window_left=70)]
)
def test_contiguous_gpu(hopper, layout, odd, variant):
    """With a number of tokens that is a multiple of 8, which the copy engine takes, and with one that is not."""
    kv_lens = [*KV_LENS[:-1], KV_LENS[-1] + (-sum(KV_LENS)) % 8 + odd]
    check(
        variant,
        QO_LENS,
        kv_lens,
        op="ragged",
        backend="mosaic",
        group=4,
        head_dim=(128, 128),
        dtype=jnp.bfloat16,
        layout=layout,
        **FEW_SMS,
    )


@pytest.mark.gpu
def test_contiguous_fp8_gpu(hopper):
    """Through the rows, also of a number of tokens that the copy engine would take."""
    check(
        Variant(causal=True, window_left=300),
        QO_LENS,
        [*KV_LENS[:-1], KV_LENS[-1] + (-sum(KV_LENS)) % 8],
        op="ragged",
        backend="mosaic",
        group=4,
        head_dim=(128, 128),
        dtype=jnp.bfloat16,
        kv_dtype=E4M3,
        layout="HND",
        **FEW_SMS,
    )


VARIANTS = [
    Variant(causal=True, window_left=0),
    Variant(causal=True, window_left=127, sinks=True),
    Variant(causal=True, window_left=300, soft_cap=20.0),
    Variant(window_left=50, window_right=40),
    Variant(window_right=200, sinks=True, soft_cap=30.0),
    Variant(causal=True, soft_cap=5.0),
    Variant(causal=True, sinks=True),
]


SHAPES = [(1, 128), (16, 128), (16, 64), (64, 256)]  # page_size, head_dim


@pytest.mark.gpu
@pytest.mark.parametrize(
    "variant, page_size, head_dim",
    [
        pytest.param(variant, *shape, marks=pytest.mark.slow if (i + j) % 3 else ())
        for i, variant in enumerate(VARIANTS)
        for j, shape in enumerate(SHAPES)
    ],
)
def test_variants_gpu(hopper, variant, page_size, head_dim):
    check(
        variant,
        QO_LENS,
        KV_LENS,
        backend="mosaic",
        page_size=page_size,
        group=4,
        head_dim=(head_dim, head_dim),
        dtype=jnp.bfloat16,
        **FEW_SMS,
    )


FP8_CASES = [
    # page_size, of the cache, of q, scales, layout, head_dim
    (1, E4M3, jnp.bfloat16, "head", "NHD", 128, Variant(causal=True)),
    (16, E4M3, jnp.bfloat16, "tensor", "HND combined", 128, VARIANTS[1]),
    (5, E5M2, jnp.float16, None, "NHD combined", 64, Variant(causal=True, soft_cap=5.0)),
    (64, E5M2, jnp.bfloat16, "head", "HND", 64, VARIANTS[3]),
    (256, E4M3, jnp.float16, "head", "NHD", 128, VARIANTS[4]),
    (16, jnp.bfloat16, jnp.bfloat16, "head", "NHD", 256, VARIANTS[4]),
    (1, E4M3, jnp.bfloat16, "token", "HND", 128, VARIANTS[1]),
    (16, E4M3, jnp.bfloat16, "token", "NHD combined", 128, VARIANTS[2]),
    (64, E5M2, jnp.float16, "token", "HND combined", 64, VARIANTS[3]),
    (5, E5M2, jnp.float16, "token", "NHD", 128, VARIANTS[4]),
]


def check_stored(page_size, kv_dtype, dtype, scales, layout, head_dim, variant):
    check(
        variant,
        QO_LENS,
        KV_LENS,
        backend="mosaic",
        page_size=page_size,
        group=4,
        head_dim=(head_dim, head_dim),
        dtype=dtype,
        kv_dtype=kv_dtype,
        scales=scales,
        layout=layout,
        **FEW_SMS,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("page_size, kv_dtype, dtype, scales, layout, head_dim, variant", FP8_CASES)
def test_fp8_and_scales_gpu(hopper, page_size, kv_dtype, dtype, scales, layout, head_dim, variant):
    check_stored(page_size, kv_dtype, dtype, scales, layout, head_dim, variant)


def any_size(kind):
    lens, how = (40, 3000, 0, 170), dict(new=200, out_dtype=jnp.bfloat16, sms=8)
    wild(kind, "prefill", "mosaic", jnp.bfloat16, E4M3, lens, **how)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["head", "token"])
def test_scales_of_any_size_gpu(hopper, kind):
    any_size(kind)


def far_apart(backend):
    """Values of each token's own scale, from 1e-6 to 1e6 and 0 within a head, and logits that undo these scales: every
    token counts. A NaN among the scales is for those who see the token."""
    n, rows, d = 300, 160, 64
    x = np.linspace(-14, 14, n).astype(np.float32)
    k, v = (np.zeros((n, 1, d), np.float32) for _ in range(2))
    k[:, 0, 0] = np.where(x < 0, -1, 1)
    v[:, 0] = np.random.default_rng(0).integers(1, 9, (n, d))
    k_scale, v_scale = abs(x), np.exp(-x)
    v_scale[77], v[77] = 0, 0  # as others than the append write it
    pages = np.random.default_rng(1).permutation(n + 5)[:n]
    table = ja.PageTable(i32([0, n]), i32(pages), i32([1]), 1)

    def paged(x, other, dtype):
        return jnp.full((n + 5, 1, *x.shape[1:]), other, dtype).at[pages, 0].set(x.astype(dtype))

    @jax.jit
    def attend(v_scale, sink):
        of = (paged(s[:, None], jnp.inf, jnp.float32) for s in (k_scale, v_scale))
        data = tuple(paged(x, jnp.nan, E4M3) for x in (k, v))
        cache = ja.PagedKVCache(data, scales=ja.KVScales(*of))
        heads = dict(num_qo_heads=1, num_kv_heads=1, num_sms=1)
        plan = ja.plan_prefill(i32([0, rows]), table, num_qo_tokens=rows, causal=True, **heads)
        q = jnp.zeros((rows, 1, d), jnp.bfloat16).at[:, :, 0].set(1)
        return ja.paged_prefill(q, cache, plan, sm_scale=1.0, sinks=sink[None], backend=backend)

    def run(v_scale, sink=-np.inf):
        return np.asarray(attend(v_scale, jnp.float32(sink)), np.float32)[:, 0]

    seen = np.arange(n)[None, :] <= np.arange(n - rows, n)[:, None]
    for sink in (-np.inf, 14.0):
        weights = np.where(seen, np.exp(x.astype(np.float64)), 0)
        weights /= weights.sum(axis=1, keepdims=True) + np.exp(sink)
        truth = weights @ (v_scale[:, None].astype(np.float64) * v[:, 0])
        np.testing.assert_allclose(run(v_scale, sink), truth, rtol=6e-3)
    bad = v_scale.copy()
    bad[200] = np.nan
    np.testing.assert_array_equal(
        np.isnan(run(bad)), np.broadcast_to(seen[:, 200, None], (rows, d))
    )


@pytest.mark.gpu
def test_scales_far_apart_within_a_head_gpu(hopper):
    far_apart("mosaic")


def rising(steps, dtype, kv_dtype, backend):
    """Logits that rise by a step each 100 keys towards the first, from the tile that is read first to the last one."""
    n, rows, d = 1000, 200, 64
    rng = np.random.default_rng(5)
    pages = -(-n // 16)
    places = rng.permutation(pages)

    @jax.jit
    def attend(k, v):
        def paged(x):
            x = jnp.pad(x, [(0, pages * 16 - n), (0, 0)], constant_values=jnp.nan)
            return x.reshape(pages, 16, 1, d)[np.argsort(places)]

        table = ja.PageTable(i32([0, pages]), i32(places), i32([n - 16 * (pages - 1)]), 16)
        heads = dict(num_qo_heads=1, num_kv_heads=1, num_sms=1)
        plan = ja.plan_prefill(i32([0, rows]), table, num_qo_tokens=rows, causal=True, **heads)
        q = jnp.zeros((rows, 1, d), dtype).at[:, :, 0].set(1)
        how = dict(sm_scale=1.0, return_lse=True, backend=backend)
        return ja.paged_prefill(q, ja.PagedKVCache((paged(k), paged(v))), plan, **how)

    seen = np.arange(n)[None, :] <= np.arange(n - rows, n)[:, None]
    for step in steps:
        x = step * ((n - 1 - np.arange(n)) // 100) + rng.uniform(-1, 1, n)
        k = jnp.zeros((n, d), kv_dtype).at[:, 0].set(device_array(x, kv_dtype))
        v = rng.integers(1, 9, (n, d))
        o, lse = attend(k, device_array(v, kv_dtype))
        x = np.asarray(k, np.float64)[:, 0]
        weights = np.where(seen, np.exp(x - x.max()), 0)
        total = weights.sum(axis=1, keepdims=True)
        rtol = 1.5e-3 if dtype == jnp.float16 else 5e-3  # a rounding of weights and one of results
        np.testing.assert_allclose(np.asarray(o, np.float64)[:, 0], weights / total @ v, rtol=rtol)
        assert_lse(lse[:, 0], np.log(total[:, 0]) + x.max())


RISING = (jnp.bfloat16, jnp.bfloat16), (jnp.float16, jnp.float16), (jnp.bfloat16, E4M3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, kv_dtype", RISING)
def test_logits_that_rise_gpu(hopper, dtype, kv_dtype):
    """By less than what the sums are multiplied for anew (8 binades: 5.55), by a little more, and by very much."""
    rising((0.5, 2.75, 5.5, 5.625, 30.0, -5.5), dtype, kv_dtype, "mosaic")


@pytest.mark.gpu
@pytest.mark.parametrize("towards", ["first", "last"])
def test_logits_of_2_27_binades_rise_gpu(hopper, towards):
    """By 16 binades, the distance of float32's numbers there: a weight of 2^16 would be float16's infinity."""
    n, rows, d = 512, 256, 64
    rise = np.arange(n)[:: -1 if towards == "first" else 1] // 128  # whichever tile is read first
    q, k = (np.zeros((x, 1, d), np.float16) for x in (rows, n))
    q[:, 0, :2], q[:, 0, 2] = (
        (2**13, 8),
        8 * np.arange(rows),
    )  # the mantissas of rows end in 0 and in 1
    k[:, 0, 0], k[:, 0, 1], k[:, 0, 2] = 2**13, rise, 1
    v = np.random.default_rng(7).integers(1, 9, (n, 1, d))
    heads = dict(num_qo_heads=1, num_kv_heads=1, num_sms=1, causal=False)
    plan = ja.plan_ragged_prefill(i32([0, rows]), i32([0, n]), num_qo_tokens=rows, **heads)
    how = dict(sm_scale=2 * np.log(2), backend="mosaic")
    o = ja.ragged_prefill(
        device_array(q), device_array(k), device_array(v, jnp.float16), plan, **how
    )
    weights = np.exp2(16.0 * (rise - rise.max()))
    want = np.broadcast_to(weights / weights.sum() @ v[:, 0], (rows, d))
    np.testing.assert_allclose(np.asarray(o, np.float64)[:, 0], want, rtol=1.5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("judge, tokens", [(extremes, 64), (long_tail, 256)])
def test_products_in_float16_gpu(hopper, judge, tokens):
    judge("mosaic", tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kv_dtype", [E4M3, E5M2])
def test_every_fp8_number_is_itself_gpu(hopper, kv_dtype, dtype):
    every_number(kv_dtype, dtype)


def every_number(kv_dtype, dtype):
    """A value of each bit pattern, seen with weight 1: NaN and infinities stay, all others are exact."""
    numbers = np.arange(256, dtype=np.uint8).view(jnp.dtype(kv_dtype))
    v = device_array(numbers.reshape(1, 1, 2, 128))
    table = ja.PageTable(i32([0, 1]), i32([0]), i32([1]), 1)
    plan = ja.plan_prefill(
        i32([0, 64]),
        table,
        num_qo_tokens=64,
        num_qo_heads=4,
        num_kv_heads=2,
        causal=False,
        num_sms=1,
    )
    cache = ja.PagedKVCache((jnp.zeros_like(v), v))
    o = ja.paged_prefill(jnp.ones((64, 4, 128), dtype), cache, plan, backend="mosaic")
    want = np.repeat(numbers.astype(np.float32).reshape(2, 128), 2, axis=0)
    np.testing.assert_array_equal(np.asarray(o, np.float32), np.broadcast_to(want, (64, 4, 128)))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "page_size, dtype, scales",
    [
        *[(p, jnp.bfloat16, None) for p in (1, 16, 128)],
        (16, E4M3, None),
        (16, E4M3, "token"),
    ],
)
def test_absent_pages_gpu(hopper, page_size, dtype, scales):
    absent_pages(page_size, dtype, scales)


def absent_pages(page_size, dtype, scales):
    """A page that is not in the cache counts as absent keys: as a shorter request sees the others."""
    shape = dict(page_size=page_size, num_kv_heads=2, head_dim=128, dtype=dtype)
    paged = make_paged([1000, 900, 300], **shape, spare_pages=0)
    paged = with_scales(paged, scales) if scales else paged
    bad = itertools.cycle([-1, paged.cache.num_pages, 2**31 - 1, -(2**31)])
    indices = np.asarray(paged.table.indices).copy()
    count = -(-1000 // page_size)
    for entry in range(1, count, 3):
        indices[entry] = next(bad)
    table = ja.PageTable(paged.table.indptr, i32(indices), paged.table.last_page_len, page_size)
    q = device_array(np.random.default_rng(1).standard_normal((900, 8, 128)), jnp.bfloat16)

    def run(backend):
        plan = ja.plan_prefill(
            i32([0, 600, 800, 900]),
            table,
            num_qo_tokens=900,
            num_qo_heads=8,
            num_kv_heads=2,
            **FEW_SMS,
        )
        return ja.paged_prefill(q, paged.cache, plan, return_lse=True, backend=backend)

    o, lse = jax.jit(lambda: run("mosaic"))()
    want, want_lse = jax.jit(lambda: run("xla"))()
    assert_lse(lse, want_lse)
    np.testing.assert_allclose(
        o.astype(jnp.float32), want.astype(jnp.float32), atol=0.02, rtol=0.02
    )


def programs(page_size=16, tokens=2048):
    """(a jitted prefill with backend, its arguments): two requests that fill the tokens."""
    paged = make_paged([tokens, tokens], page_size=page_size, num_kv_heads=2, head_dim=128)
    rng = np.random.default_rng(3)
    q = device_array(rng.standard_normal((2 * tokens, 8, 128)), jnp.bfloat16)

    def prefill(q, cache, table, backend="mosaic"):
        plan = ja.plan_prefill(
            i32([0, tokens, 2 * tokens]),
            table,
            num_qo_tokens=2 * tokens,
            num_qo_heads=8,
            num_kv_heads=2,
            **FEW_SMS,
        )
        return ja.paged_prefill(q, cache, plan, return_lse=True, backend=backend)

    return prefill, (q, paged.cache, paged.table)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 16])
def test_repeats_to_the_bit_gpu(hopper, page_size):
    prefill, args = programs(page_size)
    prefill = jax.jit(prefill)
    first = prefill(*args)
    for _ in range(20):
        assert all(map(same_bits, first, prefill(*args)))


@pytest.mark.gpu
def test_in_programs_gpu(hopper):
    """scan, while_loop, vmap and a derivative around it."""
    prefill, args = programs(tokens=512)
    want = jax.jit(prefill)(*args)

    def scanned(*args):
        return jax.lax.scan(lambda carry, _: (carry, prefill(*args)), 0, length=2)[1]

    def looped(*args):
        out = jax.tree.map(jnp.zeros_like, want)
        return jax.lax.while_loop(
            lambda s: s[0] < 2, lambda s: (s[0] + 1, prefill(*args)), (0, out)
        )[1]

    for got, of_one in zip(jax.jit(scanned)(*args), want, strict=True):
        assert all(same_bits(got[i], of_one) for i in (0, 1))
    assert all(map(same_bits, want, jax.jit(looped)(*args)))
    batched = jax.jit(jax.vmap(prefill, in_axes=(0, None, None)))(
        jnp.stack([args[0]] * 2), *args[1:]
    )
    np.testing.assert_allclose(batched[1][1], want[1], rtol=2e-5, atol=2e-5)

    def loss(q, backend):
        return prefill(q, *args[1:], backend=backend)[0].astype(jnp.float32).sum()

    ours, theirs = (
        jax.jit(jax.grad(loss), static_argnums=1)(args[0], b) for b in ("mosaic", "xla")
    )
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), atol=0.05)


@pytest.mark.gpu
def test_it_is_the_default_gpu(hopper):
    prefill, args = programs()
    traced = jax.jit(lambda *args: prefill(*args, backend=None)).trace(*args)
    assert "wgmma" in str(traced.jaxpr)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 16])
def test_a_cache_beyond_2_31_elements_gpu(hopper, gpu_memory, page_size):
    gpu_memory(14)
    beyond_2_31(page_size)


def beyond_2_31(page_size):
    kh, d, tokens = 8, 128, 1024
    num_pages = 2**31 // (page_size * kh * d) + 2000
    rng = np.random.default_rng(4)
    boundary = 2**31 // (page_size * kh * d)
    pages = boundary - 20 + rng.permutation(tokens // page_size if page_size > 1 else tokens)
    k, v = (rng.standard_normal((tokens, kh, d)).astype(np.float32) for _ in range(2))
    shape = (len(pages), page_size, kh, d)
    arrays = []
    for x in (k, v):
        small = device_array(x, jnp.bfloat16).reshape(shape)
        put = jax.jit(lambda c, s: c.at[i32(pages)].set(s), donate_argnums=0)
        arrays.append(put(jnp.full((num_pages, page_size, kh, d), jnp.nan, jnp.bfloat16), small))
    q = device_array(rng.standard_normal((tokens, 16, d)), jnp.bfloat16)

    def run(cache, pages, backend):
        table = ja.PageTable.from_block_table(pages[None], i32([tokens]), page_size)
        plan = ja.plan_prefill(
            i32([0, tokens]), table, num_qo_tokens=tokens, num_qo_heads=16, num_kv_heads=kh
        )
        return ja.paged_prefill(q, cache, plan, return_lse=True, backend=backend)

    big = ja.PagedKVCache(tuple(arrays))
    o, lse = jax.jit(run, static_argnums=2)(big, i32(pages), "mosaic")
    small = ja.PagedKVCache(tuple(device_array(x, jnp.bfloat16).reshape(shape) for x in (k, v)))
    want, want_lse = jax.jit(run, static_argnums=2)(
        small, jnp.arange(len(pages), dtype=jnp.int32), "xla"
    )
    assert_lse(lse, want_lse)
    np.testing.assert_allclose(
        o.astype(jnp.float32), want.astype(jnp.float32), atol=0.02, rtol=0.02
    )


@pytest.mark.gpu
def test_under_shard_map_gpu(hopper):
    mesh = jax.make_mesh((1, 1), ("dp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    fn, structs = sharded_prefill(mesh)
    rng = np.random.default_rng(5)
    q, k, v, _, _, sinks = (
        device_array(rng.standard_normal(x.shape, np.float32), x.dtype) for x in structs
    )
    where = i32(rng.permutation(128)[None]), i32([2000])
    o, lse = jax.jit(fn)(q, k, v, *where, sinks)
    table = ja.PageTable.from_block_table(*where, 16)
    plan = ja.plan_prefill(
        i32([0, 2048]), table, num_qo_tokens=2048, num_qo_heads=8, num_kv_heads=2
    )
    cache = ja.PagedKVCache((k, v))
    want = ja.paged_prefill(q, cache, plan, sinks=sinks, return_lse=True, backend="mosaic")
    assert all(map(same_bits, (o, lse), want))
