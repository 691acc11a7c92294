"""The README's Python examples run as they stand."""

import re
from pathlib import Path

import jax
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("source", EXAMPLES, ids=["functions", "classes"])
def test_example(source):
    names = {}
    exec(compile(source, "README.md", "exec"), names)
    assert not jax.numpy.isnan(names["o"].astype("float32")).any()
