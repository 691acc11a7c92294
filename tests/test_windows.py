"""Layers that see a window: rings of pages, how few they are, and that nobody reads what is behind them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import device_array, i32
from tiny import CONFIG, ROPE, paged_logits, random_params, random_prompts

from jaxattn.call import Choices, Sizes, check_call, pages_needed
from jaxattn.generator import Generator, round_up
from jaxattn.models import decoder
from jaxattn.models.feed_forward import Gated
from jaxattn.models.layer_spec import LayerSpec
from jaxattn.models.rope_scaling import RopeConfig
from jaxattn.page_rings import allocate_pages, pages_of

WINDOW = 9
LOCAL = LayerSpec(Gated(96), RopeConfig(100.0), WINDOW)
# Three KV heads; the windows and rotary embeddings of the two layers differ.
MIXED = dataclasses.replace(CONFIG, num_kv_heads=3, layers=(LOCAL, LayerSpec(Gated(96), ROPE)))
PARAMS = random_params(MIXED)
PROMPTS = random_prompts([40, 1, 23])
LIMITS = [30, 12, 1]


def test_pages_of_a_ring_are_those_that_a_window_can_reach():
    """Counted over all places where tokens that are appended at once may begin."""
    for page_size in (1, 3, 4):
        for window in (1, 2, 5, 8):
            for at_once in (1, 2, 7):
                reached = [
                    (begin + at_once - 1) // page_size - (begin - window + 1) // page_size + 1
                    for begin in range(window - 1, window + page_size)
                ]
                assert pages_of(1000, page_size, window, at_once) == max(reached)
    assert pages_of(17, 4, 1000) == pages_of(17, 4) == 5
    assert pages_of(0, 4, 8) == 0


def test_a_ring_repeats_and_shares_no_page():
    table = allocate_pages([40, 0, 9], 4, 8, max_pages=12, owned=[4, 0, 3])
    assert (table[0, :10] == table[0, np.arange(10) % 4]).all() and (table[0, 10:] == -1).all()
    assert (table[1] == -1).all() and (table[2, 3:] == -1).all()
    assert len({*table[0, :4], *table[2, :3]}) == 7


@pytest.mark.slow
@pytest.mark.parametrize("decode", [True, False])
def test_pages_behind_a_window_are_not_read(decode):
    """Their entries may name a page of NaN: not a bit of the logits changes."""
    config = dataclasses.replace(MIXED, layers=(LOCAL,))
    params, page_size, nan = random_params(config), 4, 6
    new = 1 if decode else 3
    kv_len = 18 + new
    caches = jax.tree.map(
        lambda x: (
            device_array(np.random.default_rng(0).standard_normal(x.shape), x.dtype)
            .at[nan]
            .set(jnp.nan)
        ),
        decoder.empty_caches(config, 7, page_size, jnp.float32),
    )
    behind = (kv_len - new - WINDOW + 1) // page_size
    assert behind == 2  # pages; of the next some tokens are behind the window, others are not
    table = np.asarray([[3, 1, 5, 0, 2, 4]], np.int32)
    with_nan = table.copy()
    with_nan[0, :behind] = nan

    @jax.jit
    def run(block_table):
        batch = decoder.make_batch(
            config,
            jnp.arange(new, dtype=jnp.int32),
            jnp.arange(kv_len - new, kv_len, dtype=jnp.int32),
            jnp.zeros(new, jnp.int32),
            (block_table,),
            jnp.full(1, kv_len, jnp.int32),
            page_size=page_size,
            qo_indptr=None if decode else i32([0, new]),
        )
        tables = decoder.rope_tables(config, kv_len)
        rows = jnp.arange(new, dtype=jnp.int32)
        return decoder.forward(params, config, batch, caches, tables, rows, backend="interpret")[0]

    logits = np.asarray(run(device_array(with_nan)))
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(logits, run(device_array(table)))
    # One page further on, NaN would be seen.
    with_nan[0, behind] = nan
    assert np.isnan(run(device_array(with_nan))).all()


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", [None, jnp.float8_e4m3fn])
def test_rings_hold_what_windows_need_and_no_more(kv_dtype):
    """Every page of a ring is written several times; each token is the choice after one prefill of all before it.

    In that nothing is written anew before it is read.
    """
    sizes = Sizes(prefill_chunk=7, page_size=4, stream_every=8)
    generator = Generator(PARAMS, MIXED, sizes, kv_dtype=kv_dtype)
    tokens = generator.generate(PROMPTS, max_new_tokens=LIMITS).tokens
    contexts = [prompt + new[:-1] for prompt, new in zip(PROMPTS, tokens, strict=True)]
    at_once = paged_logits(PARAMS, MIXED, contexts, kv_dtype=kv_dtype)
    for prompt, new, logits in zip(PROMPTS, tokens, at_once, strict=True):
        assert np.argmax(logits[len(prompt) - 1 :], axis=1).tolist() == new
    # Requests of 70, 13 and 24 tokens; the window less one and a chunk's tokens, 15 of the first and 9 of the second,
    # wherever pages begin.
    local, full = generator._caches
    assert (local.num_pages, full.num_pages) == (round_up(5 + 3 + 5), round_up(18 + 4 + 6))
    # The caches are kept, and used by a call that needs fewer.
    kept = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(generator._caches)}
    fewer = [LIMITS[0] - 1, *LIMITS[1:]]
    again = generator.generate(PROMPTS, max_new_tokens=fewer).tokens
    assert again == [new[:limit] for new, limit in zip(tokens, fewer)]
    assert kept == {x.unsafe_buffer_pointer() for x in jax.tree.leaves(generator._caches)}


def test_num_pages_are_those_of_the_widest_window():
    def pages(layers, lengths):
        config = dataclasses.replace(MIXED, layers=layers)
        sizes = Sizes(prefill_chunk=7, page_size=4, num_pages=40)
        call = check_call(
            config, sizes, random_prompts(lengths), max_new_tokens=30, choices=Choices()
        )
        return list(map(sum, pages_needed(config, sizes, call)))

    assert pages(MIXED.layers, [40, 10, 2]) == [18 + 10 + 8, 5 + 5 + 4]
    # A model whose layers all see a window serves longer contexts from as many pages.
    assert pages((LOCAL,) * 2, [200] * 8) == [40]
    with pytest.raises(ValueError, match="9 requests need 45 pages of 4 tokens .* num_pages=40"):
        pages((LOCAL,) * 2, [200] * 9)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "how", [dict(), dict(piece=100), dict(decode=True)], ids=["prefill", "chunked", "decode"]
)
@pytest.mark.parametrize("head_dim", [128, 256])
def test_triton_bf16_logits_of_a_gemma_rival_xlas(how, head_dim):
    """With all that Gemma 2 and 3 have: caps, windows, two rotary embeddings, norms before and after, a scale."""
    mlp = Gated(1024, "gelu_pytorch_tanh")
    config = dataclasses.replace(
        MIXED,
        hidden_size=512,
        layers=(LayerSpec(mlp, RopeConfig(1e4), 64), LayerSpec(mlp, RopeConfig(1e6))) * 2,
        head_dim=head_dim,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        qk_norm=True,
        norm_after=True,
        unit_offset=True,
        sm_scale=0.05,
        attention_soft_cap=50.0,
        logits_soft_cap=30.0,
        embedding_scale=512**0.5,
    )
    params = random_params(config, jnp.bfloat16)
    requests = random_prompts([300, 1, 77])
    exact = jax.tree.map(lambda weight: weight.astype(jnp.float32), params)
    ours, plain, truth = (
        paged_logits(weights, config, requests, page_size=16, backend=backend, **how)
        for weights, backend in ((params, "triton"), (params, "xla"), (exact, "xla"))
    )
    for a, b, c in zip(ours, plain, truth, strict=True):
        error, plain_error = np.abs(a - c).max(), np.abs(b - c).max()
        assert error <= 2 * plain_error, f"{error=:.3g}, {plain_error=:.3g}"


@pytest.mark.slow
def test_a_batch_must_be_of_the_models_windows():
    one = jnp.zeros(1, jnp.int32)
    how = dict(page_size=4, qo_indptr=None)
    with pytest.raises(ValueError, match=r"block_tables must be .* \(None, 9\); got 1 of them"):
        decoder.make_batch(MIXED, one, one, one, (one[:, None],), one + 1, **how)
    with pytest.raises(ValueError, match=r"num_pages must be .* \(None, 9\); got 3 of them"):
        decoder.empty_caches(MIXED, [1, 2, 3], 4, jnp.float32)
    batch = decoder.make_batch(MIXED, one, one, one, (one[:, None],) * 2, one + 1, **how)
    caches = decoder.empty_caches(MIXED, [2, 1], 4, jnp.float32)
    assert [cache.num_pages for cache in caches] == [1, 2]
    tables = decoder.rope_tables(MIXED, 4)
    swapped = batch._replace(plans=batch.plans[::-1])
    with pytest.raises(ValueError, match=r"\(None, 9\); that of None has window_left=8"):
        decoder.decode_step(PARAMS, MIXED, swapped, caches, tables)
    alone = batch._replace(page_tables=batch.page_tables[0])
    with pytest.raises(ValueError, match="page_tables must be a tuple, .*; got PageTable"):
        decoder.decode_step(PARAMS, MIXED, alone, caches, tables)
