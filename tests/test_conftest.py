"""Which tests a command runs."""

import pytest
from conftest import asks_for_slow


@pytest.mark.parametrize(
    "marks,args,expected",
    [
        ("gpu", ["tests"], False),
        ("gpu", ["/somewhere/tests"], False),
        ("not gpu", ["tests"], False),
        ("gpu and slow", ["tests"], True),
        ("gpu or slow", ["tests"], True),
        ("gpu", ["tests/test_flashinfer_grids.py"], True),
        ("gpu", ["tests", "tests/test_fp8.py::test_attention[None]"], True),
    ],
)
def test_slow_tests_of_a_gpu_run_where_they_are_asked_for(marks, args, expected):
    assert asks_for_slow(marks, args) == expected
