"""The command line of generation."""

import json
import subprocess
import sys

import jax.numpy as jnp
import pytest

from examples import demo
from jaxattn.generate import generate, main
from jaxattn.models.weights import load


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("checkpoint")
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, head_dim=16)
    demo.write_checkpoint(folder, {**demo.CONFIG, **sizes})
    return folder


def cli(*args) -> int:
    return main([str(arg) for arg in args])


def test_cli_streams_text(checkpoint, capsys):
    arguments = ("--model", checkpoint, "--prompt", "A page of ", "--dtype", "float32")
    assert cli(*arguments, "--max-new-tokens", 40) == 0
    streamed, progress = capsys.readouterr()
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(
        str(checkpoint / "tokenizer.json")
    )
    config, params = load(checkpoint, jnp.float32)
    prompt = tokenizer.encode("A page of ").ids
    (tokens,) = generate(params, config, [prompt], max_new_tokens=40).tokens
    assert streamed == tokenizer.decode(tokens) + "\n"
    assert "loading: 9/9 weights" in progress and f"prefill: {len(prompt)}" in progress
    assert "decode 39 tokens at" in progress and "s of compilation" in progress
    text = tokenizer.decode(tokens)
    assert cli(*arguments, "--max-new-tokens", 40, "--stop", text[9:12], "--stop", "never") == 0
    assert capsys.readouterr().out == text.split(text[9:12])[0] + "\n"
    draws = ("--temperature", 2, "--top-k", 1, "--min-p", 0.1)
    assert cli(*arguments, "--max-new-tokens", 40, *draws) == 0
    assert capsys.readouterr().out == streamed
    assert cli(*arguments, "--max-new-tokens", 4, "--kv-dtype", "fp8") == 0
    assert "decode 3 tokens at" in capsys.readouterr().err


@pytest.mark.slow
def test_cli_takes_a_file_of_prompts(checkpoint, tmp_path, capsys):
    (tmp_path / "prompts").write_text("One page.\n\nTwo pages, then.\n")
    arguments = ("--model", checkpoint, "--batch", tmp_path / "prompts", "--max-new-tokens", 3)
    draws = ("--temperature", 0.7, "--top-p", 0.9, "--seed", 5, "--page-size", 4, "--num-pages", 30)
    outputs = []
    for chunk in (4, 64):
        assert cli(*arguments, *draws, "--prefill-chunk", chunk) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0].startswith("[0] ") and "\n[1] " in outputs[0]
    assert outputs[0] == outputs[1]


@pytest.mark.slow
def test_cli_takes_token_ids_where_there_is_no_tokenizer(checkpoint, capsys):
    (checkpoint / "tokenizer.json").rename(checkpoint / "aside")
    try:
        assert cli("--model", checkpoint, "--prompt", "1 2 3", "--max-new-tokens", 4) == 0
        assert len(capsys.readouterr().out.split()) == 4
        assert cli("--model", checkpoint, "--prompt", "one two") == 1
        error = capsys.readouterr().err
        assert "tokenizer.json is missing" in error and "got 'one two'" in error
    finally:
        (checkpoint / "aside").rename(checkpoint / "tokenizer.json")


@pytest.mark.slow
def test_cli_stops_at_the_models_eos(checkpoint, capsys):
    config, params = load(checkpoint)
    (tokens,) = generate(params, config, [[1, 2, 3]], max_new_tokens=6).tokens
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens[2]}))
    (checkpoint / "tokenizer.json").rename(checkpoint / "aside")
    try:
        assert cli("--model", checkpoint, "--prompt", "1 2 3", "--max-new-tokens", 6) == 0
        assert list(map(int, capsys.readouterr().out.split())) == tokens[:3]
    finally:
        (checkpoint / "aside").rename(checkpoint / "tokenizer.json")
        (checkpoint / "generation_config.json").unlink()


def test_cli_errors(checkpoint, tmp_path, monkeypatch, capsys):
    def error_of(*args):
        assert cli(*args) == 1
        return capsys.readouterr().err

    assert "there is no folder" in error_of("--model", tmp_path / "nowhere", "--prompt", "a")
    assert "give --prompt TEXT or --batch FILE" in error_of("--model", checkpoint)
    assert "No such file" in error_of("--model", checkpoint, "--batch", tmp_path / "nothing")
    assert "raise it" in error_of("--model", checkpoint, "--prompt", "a", "--num-pages", 1)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install 'jaxattn[models]'" in error_of("--model", checkpoint, "--prompt", "a")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--prompt", "a", "--temperature", -1), "temperature must be 0 or positive; got -1"),
        (("--prompt", "a", "--top-p", 0), "top_p must be in"),
        (("--prompt", "a", "--seed", -1), "seed must be an integer, at least 0; got -1"),
        (("--prompt", "a", "--max-new-tokens", 0), "max_new_tokens must be a positive integer"),
        (("--prompt", "a", "--max-new-tokens", 5000), "exceeds config.max_position_embeddings"),
        (("--prompt", "a", "--page-size", 0), "page_size must be a positive integer; got 0"),
        (("--prompt", "a", "--num-pages", 0), "num_pages must be a positive integer; got 0"),
        (("--prompt", "a", "--num-pages", 1), "num_pages=1: raise it"),
        (("--prompt", "a", "--prefill-chunk", 0), "prefill_chunk must be a positive integer"),
        (("--prompt", "a", "--prompt", ""), "prompt 1 has none"),
        ((), "give --prompt TEXT or --batch FILE"),
    ],
    ids=str,
)
def test_cli_checks_its_arguments_before_it_reads_weights(
    checkpoint, monkeypatch, capsys, args, message
):
    monkeypatch.setattr(
        "jaxattn.generate.load", lambda *args, **options: pytest.fail("weights were read")
    )
    assert cli("--model", checkpoint, *args) == 1
    assert message in capsys.readouterr().err


def test_cli_rewrites_its_progress_on_a_terminal_only(checkpoint, monkeypatch, capsys):
    arguments = ("--model", checkpoint, "--prompt", "A page", "--max-new-tokens", 2)
    assert cli(*arguments) == 0
    progress = capsys.readouterr().err
    assert "\r" not in progress and progress.count("loading: ") == 1
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli(*arguments) == 0
    progress = capsys.readouterr().err
    assert "\rloading: 1/9 weights\rloading: 2/9 weights" in progress


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "jaxattn.generate", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--max-new-tokens" in done.stdout


def test_cli_says_that_a_tokenizer_is_broken(checkpoint, capsys):
    pytest.importorskip("tokenizers")
    whole = (checkpoint / "tokenizer.json").read_text()
    try:
        (checkpoint / "tokenizer.json").write_text("{broken")
        assert main(["--model", str(checkpoint), "--prompt", "a"]) == 1
        assert "must be a tokenizer; it does not load" in capsys.readouterr().err
    finally:
        (checkpoint / "tokenizer.json").write_text(whole)
