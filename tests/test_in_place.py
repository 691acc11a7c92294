"""In place is in place: programs compiled for an H200, which takes no GPU, copy no donated buffer.

Nor do they spend a kernel a layer on the counters that attention overwrites.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest
from tiny import CONFIG

import jaxattn as ja
from benchmarks.compiled import described_mesh
from jaxattn.models import decoder
from jaxattn.models.stored_experts import GptOssExperts
from jaxattn.models.weights import sources

bf16, i32 = jnp.bfloat16, jnp.int32
T, D, PAGES, PAGE_SIZE, BATCH = 256, 128, 64, 16, 4


def struct(*shape, dtype=bf16):
    return jax.ShapeDtypeStruct(shape, dtype)


def compile_for_h200(fn, donated, *args, **options):
    """(the optimised program's text, its memory analysis); skips where JAX cannot compile for one."""
    try:
        mesh = described_mesh("h200")
    except RuntimeError as error:
        pytest.skip(f"{error}; and JAX_PLATFORMS=cpu where there is no GPU")
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), args)
    with jax.sharding.set_mesh(mesh):
        lowered = jax.jit(fn, donate_argnums=donated).lower(*args)
        # Matrix products are not what is tested; trying them out takes a GPU. conftest.py lowers the level for a CPU.
        options = {"xla_gpu_autotune_level": 0, "xla_backend_optimization_level": 3, **options}
        compiled = lowered.compile(compiler_options=options)
    return compiled.as_text(), compiled.memory_analysis()


def copied(text):
    """Elements of each array that an instruction of the program copies, inside of fusions too."""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\]\S* (?:copy|copy-start)\(", text)
    return [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]


def cache(layout="NHD", combined=False):
    return jax.eval_shape(
        lambda: ja.PagedKVCache.zeros(
            PAGES, PAGE_SIZE, 2, D, bf16, layout=layout, combined=combined
        )
    )


TOKENS = (struct(T, dtype=i32), struct(T, dtype=i32))
TABLE = struct(4096, D, dtype=jnp.float32)
PAGE_TABLE = ja.PageTable(*(struct(n, dtype=i32) for n in (BATCH + 1, PAGES, BATCH)))
HEADS, KV_HEADS = struct(T, 8, D), struct(T, 2, D)


def norm(x, weight):
    return ja.rmsnorm(x, weight, in_place=True)


def rope(query, key, positions, table):
    return ja.apply_rope_with_cos_sin_cache_inplace(positions, query, key, D, table)


def rope_partly(query, key, positions, table):
    return rope(query, key, positions, table[:, :64])


OPS = {
    "rmsnorm": (norm, (0,), struct(T, 4096), struct(4096)),
    "fused_add_rmsnorm": (
        ja.fused_add_rmsnorm, (0, 1), struct(T, 5120), struct(T, 5120), struct(5120)
    ),
    "rope": (rope, (0, 1), HEADS, KV_HEADS, TOKENS[0], TABLE),
    "partial rope": (rope_partly, (0, 1), HEADS, KV_HEADS, TOKENS[0], TABLE),
    "append": (ja.append_paged_kv_cache, (4,), KV_HEADS, KV_HEADS, *TOKENS, cache(), PAGE_TABLE),
    "append, one array": (
        ja.append_paged_kv_cache, (4,),
        KV_HEADS, KV_HEADS, *TOKENS, cache("HND", combined=True), PAGE_TABLE,
    ),
    "rope_append": (
        ja.rope_append_paged_kv_cache, (4,),
        struct(T, 12 * D), *TOKENS, TABLE, cache("HND"), PAGE_TABLE,
    ),
    "rope_append, one array": (
        ja.rope_append_paged_kv_cache, (4,),
        struct(T, 12 * D), *TOKENS, TABLE, cache(combined=True), PAGE_TABLE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_donated_buffers_are_not_copied(name):
    fn, donated, *args = OPS[name]
    text, memory = compile_for_h200(fn, donated, *args)
    buffers = [x for i in donated for x in jax.tree.leaves(args[i])]
    assert memory.alias_size_in_bytes == sum(x.size * x.dtype.itemsize for x in buffers)
    assert "jaxattn_" in text
    assert not copied(text)


def test_a_copy_would_be_seen():
    """The donated buffer is used again after it was overwritten."""

    def norm_and_more(x, weight):
        return norm(x, weight) + x

    text, _ = compile_for_h200(norm_and_more, (0,), struct(T, 4096), struct(4096))
    assert T * 4096 in copied(text)


@pytest.mark.parametrize("decode", [True, False])
def test_a_model_copies_no_cache(decode):
    """Nor experts. One whose layers see different windows, with all that Gemma's have besides."""
    full = dataclasses.replace(CONFIG.layers[0], feed_forward=GptOssExperts(5, 2, 96))
    config = dataclasses.replace(
        CONFIG,
        layers=(dataclasses.replace(full, window=40), full),
        head_dim=64,
        qk_norm=True,
        norm_after=True,
        attention_soft_cap=50.0,
        embedding_scale=8.0,
    )
    t = BATCH if decode else T

    def step(params, tokens, positions, batch_indices, kv_len, block_tables, caches, table):
        indptr = None if decode else jnp.arange(BATCH + 1, dtype=i32) * (t // BATCH)
        batch = decoder.make_batch(
            config,
            tokens,
            positions,
            batch_indices,
            block_tables,
            kv_len,
            page_size=PAGE_SIZE,
            qo_indptr=indptr,
        )
        run = decoder.decode_step if decode else decoder.prefill
        return run(params, config, batch, caches, (table,))

    params = jax.tree.map(lambda source: struct(*source.shape), sources(config))
    caches = jax.eval_shape(lambda: decoder.empty_caches(config, (PAGES, 24), PAGE_SIZE, bf16))
    tokens = [struct(t, dtype=i32)] * 3
    block_tables = (struct(BATCH, PAGES // BATCH, dtype=i32),) * 2
    table = struct(256, 64, dtype=jnp.float32)
    text, memory = compile_for_h200(
        step, (6,), params, *tokens, struct(BATCH, dtype=i32), block_tables, caches, table
    )
    buffers = jax.tree.leaves(caches)
    assert memory.alias_size_in_bytes == sum(x.size * x.dtype.itemsize for x in buffers)
    assert text.count("jaxattn_rope_append_paged_kv_cache") >= config.num_layers
    experts = [x for x in jax.tree.leaves(params) if len(x.shape) == 3]
    assert len(experts) == 4 and text.count("jaxattn_grouped_matmul") >= 4
    assert not {x.size for x in buffers + experts} & set(copied(text))


LAYERS = 3


def counters_and_kernels(**options):
    """Of a step of attention layers that share a plan: the counters, and the kernels that zero them."""

    def step(q, caches, page_table):
        plan = ja.plan_decode(page_table, page_size=PAGE_SIZE, num_qo_heads=8, num_kv_heads=2)
        for layer in caches:
            q = ja.paged_decode(q, layer, plan)
        return q

    args = struct(BATCH, 8, D), (cache(),) * LAYERS, PAGE_TABLE
    text, _ = compile_for_h200(step, (), *args, **options)
    # They are the last operand.
    counters = re.findall(r"custom-call\(.*?(%[\w.-]+)\), .*jaxattn_paged_decode", text)
    # The value of an instruction of several outputs is taken apart first.
    kernel = dict(re.findall(r"(%[\w.-]+) = .* get-tuple-element\((%[\w.-]+)\)", text))
    return set(counters), {kernel.get(name, name) for name in counters}


def test_one_kernel_zeroes_the_counters_of_all_layers():
    counters, kernels = counters_and_kernels()
    assert len(counters) == LAYERS and len(kernels) == 1


def test_a_kernel_a_layer_would_be_seen():
    """XLA is kept from joining them."""
    counters, kernels = counters_and_kernels(xla_disable_hlo_passes="copy_fusion")
    assert len(counters) == len(kernels) == LAYERS
