"""The checks that the ops share: page tables on the host, what is no array, NumPy's memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn as ja
from jaxattn.checks import check_host_page_table, check_shape, copied_from_host


def i32(*x):
    return np.array(x, np.int32)


TABLE = dict(indptr=i32(0, 2, 2, 3), indices=i32(0, 5, 2, -9), last_page_len=i32(4, 0, 1))


@pytest.mark.parametrize("device", [(), ("indptr",), ("indices",), ("last_page_len",), TABLE])
def test_possible_tables_pass(device):
    """-9 is owned by no request. What is on the device is not read."""
    table = {name: jnp.array(x) if name in device else x for name, x in TABLE.items()}
    with jax.transfer_guard_device_to_host("disallow"):
        check_host_page_table(**table, page_size=4)
        check_host_page_table(**table, page_size=4, num_pages=6)


@pytest.mark.parametrize(
    "wrong,message",
    [
        (dict(indptr=i32(1, 2, 2, 3)), "kv_indptr must start at 0"),
        (dict(indptr=i32(0, 2, 1, 3)), "kv_indptr must start at 0 and not decrease"),
        (dict(indptr=i32(0, 2, 2, 5)), r"kv_indices must have kv_indptr\[-1\]=5 elements; got 4"),
        (dict(last_page_len=i32(0, 0, 1)), r"kv_last_page_len\[0\] must be from 1 .* got 0"),
        (dict(last_page_len=i32(4, 0, 5)), r"kv_last_page_len\[2\] must be .* page_size=4, .* 5"),
        (dict(last_page_len=i32(4, 2, 1)), r"kv_last_page_len\[1\] must be 0, as request 1 has no"),
        (dict(indptr=jnp.arange(4), last_page_len=i32(4, -1, 1)), r"last_page_len\[1\] must be"),
        (dict(indices=i32(0, 6, 2)), r"kv_indices\[1\] .* from 0 to 5, .* num_pages=6; got 6"),
        (dict(indices=i32(0, -1, 2), num_pages=None), r"kv_indices\[1\] .* at least 0; got -1"),
    ],
)
def test_impossible_tables(wrong, message):
    with pytest.raises(ValueError, match=message):
        check_host_page_table(**TABLE | dict(page_size=4, num_pages=6) | wrong)


def test_names_in_errors():
    with pytest.raises(ValueError, match=r"^last_page_len\[0\]"):
        check_host_page_table(*TABLE.values(), page_size=3, prefix="")


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: check_shape("x", [1, 2], ("n",)), r"got list: use jnp.asarray\(x\)"),
        (lambda: ja.rmsnorm([[1.0, 2.0]], jnp.ones(2)), "input must be an array; got list"),
        (lambda: ja.rmsnorm(jnp.ones((1, 2)), [1.0, 2.0]), "weight must be an array; got list"),
        (
            lambda: ja.apply_rope_pos_ids(jnp.ones((2, 1, 4)), jnp.ones((2, 1, 4)), [0, 1]),
            r"pos_ids must be an array; got list: use jnp.asarray\(pos_ids, jnp.int32\)",
        ),
        (
            lambda: ja.plan_ragged_prefill(
                [0, 1], [0, 1], num_qo_tokens=1, num_qo_heads=1, num_kv_heads=1
            ),
            r"kv_indptr must be an array; got list: use jnp.asarray\(kv_indptr, jnp.int32\)",
        ),
    ],
)
def test_what_is_no_array(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_numpys_memory_is_not_shared():
    """Large enough for JAX to read it in place on a CPU, and later."""
    buffer = np.zeros(1 << 20, np.int32)
    copied = copied_from_host(buffer)
    buffer[:] = 1
    assert not copied.any()
    array = jnp.zeros(3)
    assert copied_from_host(array) is array
