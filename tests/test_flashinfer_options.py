"""What becomes of each option: every parameter is used or has its line in OPTIONS, and the lines hold."""

import ast
import inspect
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import flashinfer
from jaxattn.flashinfer.options import (
    OPTIONS,
    Meaningless,
    Unbuilt,
    Unwritable,
    flashinfer_options,
    options_of,
)


def entry_points():
    """Every function and method of this package that FlashInfer has too, by its dotted name."""
    for name, thing in vars(flashinfer).items():
        if inspect.isclass(thing):
            for method, function in inspect.getmembers(thing, inspect.isfunction):
                own = function.__name__ == method  # other names of the same are no entry points
                if own and (method == "__init__" or not method.startswith("_")):
                    yield f"{name}.{method}", function
        elif inspect.isfunction(thing) and thing.__module__.startswith(flashinfer.__name__):
            yield name, thing


FUNCTIONS = dict(entry_points())


def names_read(function):
    """The names that a function's body reads."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    body = ast.Module(tree.body[0].body, [])
    return {x.id for x in ast.walk(body) if isinstance(x, ast.Name)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_has_an_effect_or_a_fate(name):
    function = FUNCTIONS[name]
    parameters = inspect.signature(function).parameters.keys() - {"self", "args", "kwargs"}
    read, options = names_read(function), options_of(function)
    assert parameters - read == options.keys(), "unused and without a fate, or used and with one"


def test_every_line_is_of_a_parameter():
    taken = {x for function in FUNCTIONS.values() for x in inspect.signature(function).parameters}
    assert OPTIONS.keys() <= taken


@pytest.mark.parametrize("name", FUNCTIONS)
def test_defaults_ask_for_nothing_and_docstrings_name_the_options(name):
    function = FUNCTIONS[name]
    parameters = inspect.signature(function).parameters
    for option, fate in options_of(function).items():
        default = parameters[option].default
        if default is not inspect.Parameter.empty:
            fate.check(option, default)
        assert option in function.__doc__


@pytest.mark.parametrize("name", [x for x, y in OPTIONS.items() if not isinstance(y, Meaningless)])
def test_refusals_name_the_option(name):
    """Also where the value is an array, which has no truth value."""
    for value in (jnp.ones(3), np.ones(3)):
        with pytest.raises(NotImplementedError, match=name):
            OPTIONS[name].check(name, value)


@flashinfer_options(
    mine=Unbuilt(off=(None, 0), advice="do without"),
    lse_layout=None,
    batch_indices=Unwritable(),
    o_scale=Unbuilt(off=(1,)),
)
def marked(other, mine=None, lse_layout=-1, batch_indices=None, o_scale=1, kv_cache_sf=None):
    """Adds."""
    return other + lse_layout


def test_the_decorator():
    assert marked(1) == 0
    assert marked(1, 0, 5, None, 1) == 6
    assert marked(1, np.int32(0), o_scale=np.int64(1)) == 0
    for call, message in (
        (lambda: marked(1, 3), "mine=3 is not built yet: do without"),
        (lambda: marked(1, mine=False, kv_cache_sf=jnp.ones(1)), "kv_cache_sf=ArrayImpl is not"),
        (lambda: marked(1, batch_indices=[0]), "batch_indices cannot be written"),
        (lambda: marked(1, o_scale=2), "o_scale=2 is not built yet: leave o_scale at its default"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            call()
    with pytest.raises(TypeError, match=r"marked\(\) missing 1 required positional argument"):
        marked()
    assert list(inspect.signature(marked).parameters) == [
        "other",
        "mine",
        "lse_layout",
        "batch_indices",
        "o_scale",
        "kv_cache_sf",
    ]
    assert "mine (0), o_scale (1), kv_cache_sf." in marked.__doc__.replace("\n", " ")
    assert "lse_layout" not in marked.__doc__
