"""The README's Python runs as it stands: what it quotes from examples/ by test_examples.py, the rest here."""

import re

import jax
from test_examples import EXAMPLES, README


def test_the_classes_run():
    quoted = {path.read_text() for path in EXAMPLES}
    (source,) = (x for x in re.findall(r"```python\n(.*?)```", README, re.S) if x not in quoted)
    names = {}
    exec(compile(source, "README.md", "exec"), names)
    assert not jax.numpy.isnan(names["o"].astype("float32")).any()
