"""Every example prints what its last lines say it prints, and the README quotes the files as they are."""

import runpy
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name != "demo.py")


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_prints_what_it_says(path, capsys):
    if path.stem == "flax_nnx":
        pytest.importorskip("flax")
    if path.stem == "sharding" and jax.device_count() < 2:
        pytest.skip("needs two devices")
    _, _, told = path.read_text().partition("\n# prints:\n")
    assert told
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out == told.replace("# ", "")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_readme_quotes_the_example(path):
    assert f"\n```python\n{path.read_text()}```\n" in README
