"""YaRN's and LongRoPE's frequencies, beside those of transformers."""

import warnings

import numpy as np
import pytest

from jaxattn.models.stretched_rope import longrope_frequencies, yarn_frequencies

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what these libraries warn of on import is theirs
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

DIM = 48  # of heads of 64


def theirs(settings, *, seq_len=None):
    """(frequencies, attention factor) of a Llama whose heads of 64 rotate in part."""
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, head_dim=64, max_position_embeddings=4096
    )
    config.rope_parameters = dict(settings, partial_rotary_factor=DIM / 64)
    frequencies, factor = ROPE_INIT_FUNCTIONS[settings["rope_type"]](config, seq_len=seq_len)
    return frequencies.numpy(), factor


def check(ours, want):
    frequencies, factor = ours
    assert frequencies.dtype == np.float32 and frequencies.shape == (DIM // 2,)
    np.testing.assert_allclose(frequencies, want[0], rtol=1e-6)
    assert factor == pytest.approx(want[1], rel=1e-12)


@pytest.mark.parametrize(
    "theta, factor, original, options",
    [
        (150000.0, 32.0, 4096, dict(beta_fast=32.0, beta_slow=1.0, truncate=False)),  # gpt-oss
        (1e6, 4.0, 32768, dict()),
        (1e4, 40.0, 4096, dict(mscale=0.707, mscale_all_dim=1.0)),
        (1e4, 40.0, 4096, dict(mscale=0.707, mscale_all_dim=0.0)),  # 0 counts as absent
        (1e4, 8.0, 2048, dict(attention_factor=0.5, mscale=1.0, mscale_all_dim=0.5)),
        (1e4, 1.0, 64, dict()),
        (1e4, 16.0, 8, dict(beta_fast=64, beta_slow=2)),  # both ends before index 0
        (3.0, 8.0, 10**9, dict(beta_fast=2, beta_slow=1)),  # both ends after the last
        (1e4, 8.0, 128, dict(beta_fast=4, beta_slow=4, truncate=False)),  # a step
    ],
)
def test_yarn(theta, factor, original, options):
    settings = dict(
        rope_type="yarn",
        rope_theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
        **options,
    )
    check(yarn_frequencies(DIM, theta, factor, original, **options), theirs(settings))


@pytest.mark.parametrize("max_context", [1, 4096, 4097, 100000])
@pytest.mark.parametrize("given", [dict(), dict(attention_factor=1.25)])
def test_longrope_takes_the_factors_of_the_longest_context(max_context, given):
    rng = np.random.default_rng(0)
    short, long = (rng.uniform(1, high, DIM // 2).tolist() for high in (2, 60))
    settings = dict(
        rope_type="longrope",
        rope_theta=10000.0,
        factor=32.0,
        short_factor=short,
        long_factor=long,
        original_max_position_embeddings=4096,
        **given,
    )
    ours = longrope_frequencies(
        DIM, 10000.0, short, long, 4096, factor=32.0, max_context=max_context, **given
    )
    check(ours, theirs(settings, seq_len=max_context))
    assert (ours[0] == longrope_frequencies(
        DIM, 10000.0, short, short, 4096, factor=32.0, max_context=max_context, **given
    )[0]).all() == (max_context <= 4096)  # fmt: skip


def test_longrope_of_a_model_that_was_not_stretched():
    ones = [1.0] * (DIM // 2)
    frequencies, factor = longrope_frequencies(
        DIM, 10000.0, ones, ones, 4096, factor=0.5, max_context=8
    )
    assert factor == 1.0
    np.testing.assert_allclose(frequencies, 10000.0 ** (-np.arange(DIM // 2) / (DIM / 2)), 1e-6)


def test_longrope_counts_the_factors():
    with pytest.raises(ValueError, match=r"long_factor must have rotary_dim / 2 = 24 numbers"):
        longrope_frequencies(DIM, 10000.0, [1.0] * 24, [1.0] * 23, 4096, factor=2.0, max_context=8)
