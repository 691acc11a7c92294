"""A jnp function of short arrays as one kernel. XLA makes one for each of its sums, of a microsecond or more.

Every program reads the arrays whole and computes a part of the result's entries.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxattn.kernels.triton._launch import Out, launch
from jaxattn.kernels.triton._rows import load, pow2, store

# Of a program, each compared with every element of an array. With 32 the plan of 128 requests took some 3 us more.
ENTRIES = 8
LEAST = 16  # elements of an array, padded


def _kernel(array_refs, out_ref, *, function, num_fields: int):
    entry = pl.program_id(0) * ENTRIES + jnp.arange(ENTRIES, dtype=jnp.int32)
    exist = entry * num_fields < out_ref.shape[0]
    (n,) = array_refs[0].shape
    i = jnp.arange(max(pow2(n), LEAST), dtype=jnp.int32)
    fields = function(entry, *(load(ref, i, i < n) for ref in array_refs))
    for number, field in enumerate(fields):
        store(out_ref, entry * num_fields + number, exist, field)


def in_one_program(
    function: Callable[..., Sequence[jax.Array]],
    *arrays: jax.Array,
    num_entries: int,
    num_fields: int,
    name: str,
    interpret: bool,
) -> jax.Array:
    """int32 [num_entries, num_fields]: function(entry, *arrays), int32 [entries] a field, of the entries 0, 1, ...

    Args:
      function: in registers, where arrays have no indices and their sizes are powers of two.
      *arrays: int32 [n] each; the function gets them with zeros behind.
      name: the kernel's, in profiles.
    """
    out = launch(
        functools.partial(_kernel, function=function, num_fields=num_fields),
        dict(array_refs=arrays),
        dict(out_ref=Out((num_entries * num_fields,), jnp.int32)),
        name=name,
        grid=(pl.cdiv(num_entries, ENTRIES),),
        num_warps=4,
        num_stages=1,
        interpret=interpret,
        shared=False,  # a function of this call, which may refer to arrays that it does not read
    )["out_ref"]
    return out.reshape(num_entries, num_fields)
