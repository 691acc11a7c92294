"""A mixture of experts, beside one token after another in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_rivals, device_array

from jaxattn.models.linear import Linear
from jaxattn.models.moe import ClampedSwiglu, ExpertWeights, MixtureOfExperts

HIDDEN, INNER = 24, 10


def weights_of(moe, biases, dtype=jnp.float32, hidden=HIDDEN):
    rng = np.random.default_rng(0)

    def linear(*shape):
        weight = rng.standard_normal(shape) / np.sqrt(shape[-1])
        bias = rng.standard_normal(shape[:-1]) if biases else None
        return Linear(*(None if a is None else device_array(a, dtype) for a in (weight, bias)))

    e, i = moe.num_experts, moe.intermediate_size
    return ExpertWeights(linear(e, hidden), linear(e, 2 * i, hidden), linear(e, hidden, i))


def token_by_token(moe, x, weights, scale_of):
    """Each token through its experts, in float64; scale_of(gate) is what multiplies gate."""
    x, weights = (
        np.asarray(x, np.float64),
        jax.tree.map(lambda a: np.asarray(a, np.float64), weights),
    )

    def linear(linear, x, e=...):
        return linear.weight[e] @ x + (0 if linear.bias is None else linear.bias[e])

    out = []
    for token in x:
        logits = linear(weights.router, token)
        chosen = sorted(range(len(logits)), key=lambda e: (-logits[e], e))[: moe.experts_per_token]
        among = chosen if moe.normalized else range(len(logits))
        total = sum(np.exp(logits[e]) for e in among)
        y = np.zeros_like(token)
        for e in chosen:
            gate, up = np.split(linear(weights.gate_up_proj, token, e), 2)
            y += np.exp(logits[e]) / total * linear(weights.down_proj, scale_of(gate, up), e)
        out.append(y)
    return np.asarray(out)


def silu(gate, up):
    return gate / (1 + np.exp(-gate)) * up


def clamped(gate, up, alpha=1.702, limit=0.5):
    gate, up = np.where(gate > limit, limit, gate), np.maximum(np.minimum(up, limit), -limit)
    return gate / (1 + np.exp(-alpha * gate)) * (up + 1)


@functools.partial(jax.jit, static_argnums=(0, 4))
def run(moe, x, weights, is_token, backend):
    return moe(x, weights, is_token=is_token, backend=backend)


CASES = {
    "qwen3": (MixtureOfExperts(16, 4, INNER, normalized=True), silu, False),
    "qwen3, not normalised": (MixtureOfExperts(6, 2, INNER, normalized=False), silu, False),
    "gpt-oss": (MixtureOfExperts(5, 3, INNER, activation=ClampedSwiglu(limit=0.5)), clamped, True),
    "one expert": (MixtureOfExperts(1, 1, INNER), silu, True),
}


@pytest.mark.parametrize("backend", ["xla", "interpret"])
@pytest.mark.parametrize("name", CASES)
def test_as_token_by_token(name, backend):
    moe, scale_of, biases = CASES[name]
    weights = weights_of(moe, biases)
    for t in (1, 37) if backend == "xla" else (9,):
        x = device_array(np.random.default_rng(t).standard_normal((t, HIDDEN)), jnp.float32)
        ours = run(moe, x, weights, jnp.ones(t, bool), backend)
        assert ours.dtype == x.dtype
        np.testing.assert_allclose(ours, token_by_token(moe, x, weights, scale_of), atol=2e-5)


@pytest.mark.parametrize("backend", ["xla", "interpret"])
def test_rows_that_are_no_token_change_nothing(backend):
    """They are NaN, and so are the experts that only they could want."""
    moe, _, _ = CASES["qwen3"]
    weights = weights_of(moe, True)
    x = device_array(np.random.default_rng(1).standard_normal((4, HIDDEN)), jnp.float32)
    want = run(moe, x, weights, jnp.ones(4, bool), "xla")
    is_token = device_array([False, True, True, False, True, False, True])
    padded = jnp.full((7, HIDDEN), jnp.nan).at[jnp.flatnonzero(is_token)].set(x)
    if backend == "interpret":
        unused = np.setdiff1d(np.arange(16), moe.route(x, weights.router).experts)
        assert unused.size
        gate_up = weights.gate_up_proj.weight.at[unused].set(jnp.nan)
        weights = weights._replace(gate_up_proj=weights.gate_up_proj._replace(weight=gate_up))
    ours = run(moe, padded, weights, is_token, backend)
    np.testing.assert_allclose(ours[is_token], want, atol=1e-5)
    assert (ours[~is_token] == 0).all()


def test_in_a_decode_loop():
    moe, _, _ = CASES["qwen3"]
    weights = weights_of(moe, False, jnp.bfloat16)
    x = jnp.ones((3, HIDDEN), jnp.bfloat16)

    def body(_, x):
        return x + moe(x, weights, is_token=jnp.ones(3, bool))

    looped = jax.jit(lambda x: jax.lax.fori_loop(0, 3, body, x))(x)
    assert looped.dtype == jnp.bfloat16
    step = jax.jit(lambda x: body(0, x))
    np.testing.assert_array_equal(looped, step(step(step(x))))


def test_no_more_experts_for_a_token_than_there_are():
    with pytest.raises(ValueError, match="experts_per_token=5, num_experts=4"):
        MixtureOfExperts(4, 5, INNER)


@pytest.mark.gpu
@pytest.mark.parametrize("t", [1, 33, 700])
def test_triton_bf16_rivals_xlas(t):
    rng = np.random.default_rng(t)
    moe = MixtureOfExperts(32, 4, 384, activation=ClampedSwiglu())
    weights = weights_of(moe, True, jnp.bfloat16, hidden=512)
    x = device_array(rng.standard_normal((t, 512)), jnp.bfloat16)
    is_token = device_array(rng.random(t) < 0.9).at[0].set(True)
    ours, plain = (run(moe, x, weights, is_token, backend) for backend in ("triton", "xla"))
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), (x, weights))
    truth = run(moe, *exact, is_token, "xla")
    assert_rivals(ours, truth, plain, jnp.bfloat16)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_under_an_explicit_mesh():
    moe, _, _ = CASES["gpt-oss"]
    weights, x = weights_of(moe, True), jnp.ones((3, HIDDEN)).at[1].set(-1)
    want = run(moe, x, weights, jnp.ones(3, bool), "xla")
    with jax.set_mesh(jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))):
        ours = run(moe, x, weights, jnp.ones(3, bool), "xla")
    np.testing.assert_array_equal(ours, want)
