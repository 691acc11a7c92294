"""The demo says that paged and dense attention agree, and would say if they did not."""

import jax.numpy as jnp
import pytest
from tiny import CONFIG, random_params, random_prompts

from examples import demo
from jaxattn.generate import generate


def check_demo(tmp_path, capsys):
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    assert demo.main(tmp_path) == 0
    out = capsys.readouterr().out
    assert "Paged and dense attention agree." in out and "tokens/s" in out


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    check_demo(tmp_path, capsys)


@pytest.mark.gpu
def test_demo_on_a_gpu(tmp_path, capsys):
    check_demo(tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_judge_sees_a_wrong_token(dtype):
    params = random_params(CONFIG, dtype)
    (prompt,) = random_prompts([9])
    (tokens,) = generate(params, CONFIG, [prompt], max_new_tokens=8).tokens
    same, gap, allowed = demo.judge(params, CONFIG, prompt, tokens)
    assert gap <= allowed and (same == 8 or dtype == jnp.bfloat16)
    wrong = tokens[:5] + [(tokens[5] + 1) % CONFIG.vocab_size] + tokens[6:]
    same, gap, allowed = demo.judge(params, CONFIG, prompt, wrong)
    assert same < 8 and gap > allowed
