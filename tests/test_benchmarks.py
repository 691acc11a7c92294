"""The benchmark harness: its models by hand, its checks against wrong answers, its files by schema."""

import argparse
import dataclasses
import itertools
import json
import re
import subprocess
import sys
import time
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cases, profile, providers, report, timing, tune, worker
from benchmarks import run as benchmarks_run
from benchmarks.inputs import make_inputs
from benchmarks.oracle import make_oracle, tolerance
from benchmarks.providers import jaxattn as ours
from benchmarks.timing import Call, Ceilings
from benchmarks.work import pairs, work
from jaxattn.work_list import WorkItem

SMOKE = cases.select(smoke=True)


def case(op, name="", **changes):
    found = next(c for c in cases.select(ops=[op]) if name in c.id)
    return dataclasses.replace(found, **changes)


def test_ids_are_unique():
    for smoke in (False, True):
        ids = [c.id for c in cases.select(smoke=smoke)]
        assert len(set(ids)) == len(ids)


def test_select_refuses_what_does_not_exist():
    with pytest.raises(ValueError, match="ops must be among"):
        cases.select(ops=["prefil"])
    with pytest.raises(ValueError, match="no case matches"):
        cases.select(ops=["decode"], names=["b3_7k"])


def test_both_runs_cover_every_op():
    ops = {"decode", "decode_step", "decode_loop", "prefill", "append", "merge_states"}
    ops |= {"rmsnorm", "fused_add_rmsnorm", "rope", "rope_append", "plan_decode"}
    ops |= {"grouped_matmul"}
    ops |= {"sampling", "silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"}
    assert {c.op for c in SMOKE} == ops == {c.op for c in cases.select()}


@pytest.mark.parametrize("qo_len, kv_len", [(1, 1), (1, 7), (3, 3), (4, 9)])
def test_pairs_are_the_mask_counted(qo_len, kv_len):
    seen = np.arange(kv_len)[None, :] <= np.arange(qo_len)[:, None] + kv_len - qo_len
    assert pairs(qo_len, kv_len) == seen.sum()
    assert pairs(qo_len, kv_len, causal=False) == seen.size


def test_work_of_decode():
    # K and V of 64 x 8192 tokens, 8 heads of 128, 2 bytes; q and o of 64 x 32 heads; 512 page ids a request.
    done = work(case("decode", "b64_8k/p16"))
    assert done.bytes == 2_147_483_648 + 1_048_576 + 131_072
    assert done.flops == 4 * 128 * 32 * 64 * 8192
    step = work(case("decode_step", "b32_4k/p16"))
    assert step.bytes == 32 * work(case("decode", "b32_4k/p16")).bytes


def test_work_of_prefill():
    # One causal prompt of 16384: half the square and half the diagonal.
    done = work(case("prefill", "b1_16k/p1"))
    assert done.flops == 4 * 128 * 32 * (16384 * 16385 // 2)
    assert done.bytes == 2 * 16384 * 8 * 128 * 2 + 2 * 16384 * 32 * 128 * 2 + 4 * 16384
    # 512 tokens after 32256 others.
    assert work(case("prefill", "chunk_512_32k")).flops == 4 * 128 * 32 * (
        512 * 32256 + 512 * 513 // 2
    )
    contiguous = work(case("prefill", "b1_16k/bfloat16"))
    assert contiguous.bytes == done.bytes - 4 * 16384


def test_work_of_other_masks_and_shapes():
    full = work(case("prefill", "b4_4k_full"))
    assert full.flops == 4 * 128 * 32 * 4 * 4096 * 4096
    assert full.bytes == work(case("prefill", "prefill/b4_4k/p16")).bytes
    assert "causal" not in full.model
    # 2048 of 8192 tokens, and the last of 4096 for 63 others: 512 + 63 x 256 pages.
    mixed = work(case("prefill", "mixed"))
    assert mixed.flops == 4 * 128 * 32 * (2048 * 6144 + 2048 * 2049 // 2 + 63 * 4096)
    assert mixed.bytes == 2 * 266_240 * 8 * 128 * 2 + 2 * 2111 * 32 * 128 * 2 + 4 * 16_640
    # K and V of 32 x 4096 tokens, 8 heads of 256; q and o of 32 x 32 heads; 256 page ids a request.
    wide = work(case("decode", "b32_4k_d256"))
    assert wide.bytes == 1_073_741_824 + 1_048_576 + 32_768


def test_work_of_a_plan():
    # 128 requests: 129 of indptr and 128 lengths read, 128 items of 10 written, an int32 each.
    done = work(case("plan_decode", "b128_2k"))
    assert (done.bytes, done.flops) == (4 * (129 + 128 + 1280), None)


def test_work_of_the_others():
    # 16384 tokens x 8 heads x 128 x 2 bytes, K and V, read and written; two int32 a token.
    assert work(case("append", "b4_4k/p16")).bytes == 134_217_728 + 131_072
    # 3 arrays of 4096 x 32 x (256 bytes + a float32).
    assert work(case("merge_states", "2_states")).bytes == 3 * 4096 * 32 * 260
    assert work(case("rmsnorm", "16384x4096")).bytes == 2 * 16384 * 4096 * 2 + 8192
    assert work(case("fused_add_rmsnorm", "16384x4096")).bytes == 4 * 16384 * 4096 * 2 + 8192
    # 40 heads of 256 bytes read and written, a row of 128 float32, a position.
    assert work(case("rope", "rope/16384")).bytes == 16384 * (2 * 40 * 256 + 512 + 4)
    assert work(case("rope_append", "b32_1/")).bytes == 32 * (2 * 48 * 256 + 512 + 8)
    # A token reads the 8 experts that it chose, of 1536 x 2048 x 2 bytes each, and 8 rows of float32 are written.
    one = work(case("grouped_matmul", "qwen3_30b_up_1/"))
    assert one.bytes == 8 * 1536 * 2048 * 2 + 2048 * 2 + 8 * 1536 * 4
    assert one.flops == 2 * 8 * 1536 * 2048


def test_work_of_fp8_caches():
    """A byte a number, and four for each vector's scale."""
    plain, fp8, token = (
        work(case("decode", f"decode/{name}b64_8k/p16")).bytes
        for name in ("", "fp8_", "fp8_token_")
    )
    numbers = 2 * 64 * 8192 * 8 * 128
    assert plain - fp8 == numbers
    assert token - fp8 == 4 * numbers // 128
    plain, fp8 = (work(case("append", f"append/{name}b4_4k/p16")).bytes for name in ("", "fp8_"))
    assert plain - fp8 == 2 * 16384 * 8 * 128


def test_work_of_a_decode_loop():
    # Llama-3 8B: 32 layers of 4096 x (4096 + 1024 + 1024 + 4096 + 3 x 14336) weights, and 128256 x 4096 of the head.
    weights = 32 * 218_103_808 + 525_336_576
    # 32 requests of 4096 tokens, and 1 to 32 new ones; 8 heads of 128 for each of K and V.
    keys = 32 * 4096 + 32 * 33 // 2
    done = work(case("decode_loop", "llama3_8b_b32_4k"))
    assert done.bytes == 2 * weights + 32 * (keys + 32) * 2 * 1024 * 2
    assert done.flops == 2 * 32 * weights + 32 * 4 * 4096 * keys
    # Gemma 3: of 30 layers 25 see 1024 keys, and every step all of these.
    gemma = work(case("decode_loop", "gemma3_27b_30l_b32_4k"))
    weights = 30 * 5376 * (2 * 4096 + 2 * 2048 + 3 * 21504) + 262208 * 5376
    keys = 5 * keys + 25 * 32 * 1024
    assert gemma.bytes == 2 * weights + (keys + 30 * 32) * 2 * 2048 * 2
    # gpt-oss: 32 requests that take 4 of 32 experts each miss 0.45 of them, as so many draws show.
    gpt_oss = case("decode_loop", "gpt_oss_20b_b32_4k")
    rng = np.random.default_rng(0)
    drawn = [np.unique([rng.permutation(32)[:4] for _ in range(32)]).size for _ in range(2000)]
    keys = 12 * (32 * 4096 + 32 * 33 // 2) + 12 * 32 * 128
    weights = 24 * 2880 * (2 * 4096 + 2 * 512 + 32 + 3 * 2880 * np.mean(drawn)) + 201088 * 2880
    step = work(gpt_oss)
    assert step.bytes == pytest.approx(2 * weights + (keys + 24 * 32) * 2 * 512 * 2, rel=1e-3)
    weights = 24 * 2880 * (2 * 4096 + 2 * 512 + 32 + 4 * 3 * 2880) + 201088 * 2880
    assert step.flops == 2 * 32 * weights + 4 * 4096 * keys


def test_floor_is_the_larger_of_two_times():
    ceilings = Ceilings(copy_gbps=4000.0, read_gbps=3000.0, matmul_tflops=500.0)
    assert ceilings.floor_us(8_000_000, None) == pytest.approx(2.0)
    assert ceilings.floor_us(8_000_000, 5_000_000_000) == pytest.approx(10.0)


def test_inputs_are_random_and_pages_permuted():
    x = make_inputs(next(c for c in SMOKE if c.op == "decode"))
    k, v = x.caches[0].arrays
    assert abs(float(k.astype(jnp.float32).std()) - 1) < 0.1
    assert not jnp.array_equal(k, v)
    assert sorted(x.pages.indices) == list(range(k.shape[0]))
    np.testing.assert_array_equal(x.pages.indices, x.pages.table.indices)
    np.testing.assert_array_equal(x.pages.table.kv_len(16), [33, 1, 70])


@pytest.mark.slow
@pytest.mark.parametrize("small", [c for c in SMOKE if c.op == "sampling"], ids=lambda c: c.id)
def test_oracle_of_draws_catches_one_wrong_token(small):
    x = make_inputs(small)
    oracle = make_oracle(small, x)
    (tokens,) = ours.make_call(small, x).run()
    assert oracle.error([tokens]) == 0
    for wrong in (int(x.rows[-1].argmin()), -1, small.vocab):
        assert oracle.error([tokens.at[-1].set(wrong)]) > tolerance(small)


@pytest.mark.slow
@pytest.mark.parametrize(
    "small", [c for c in SMOKE if c.op not in ("plan_decode", "sampling")], ids=lambda c: c.id
)
def test_oracle_passes_ours_and_catches_one_wrong_row(small):
    x = make_inputs(small)
    oracle = make_oracle(small, x)
    outputs = list(ours.make_call(small, x).run())
    assert oracle.error(outputs) <= tolerance(small)
    # A token of the layer, or the page slot, that comes last is never left out.
    outputs[-1] = outputs[-1].at[-1].multiply(2)
    assert oracle.error(outputs) > tolerance(small)
    outputs[-1] = outputs[-1].at[-1].set(jnp.nan)
    assert not oracle.error(outputs) <= tolerance(small)


def test_oracle_knows_the_mask():
    small = next(c for c in SMOKE if not getattr(c, "causal", True))
    x = make_inputs(small)
    causal = ours.make_call(dataclasses.replace(small, causal=True), x).run()
    assert make_oracle(small, x).error(causal) > tolerance(small)


def moved(field, item, by):
    """A plan's items with one field of one of them changed."""
    return lambda items: items.at[item, WorkItem._fields.index(field)].add(by)


# A plan of the small case: 4 rows each of 700, 1 and 1500 keys, two of them split; the last item is unused.
SOUND_PLAN = [
    WorkItem(0, 4, 0, 0, 0, 384, 0, 2, 0, 700),
    WorkItem(0, 4, 0, 0, 384, 700, 1, 2, 0, 700),
    WorkItem(4, 8, 0, 44, 0, 1, 0, 1, 2, 1),
    WorkItem(8, 12, 0, 45, 0, 512, 0, 3, 2, 1500),
    WorkItem(8, 12, 0, 45, 512, 1024, 1, 3, 2, 1500),
    WorkItem(8, 12, 0, 45, 1024, 1500, 2, 3, 2, 1500),
    WorkItem(0, 0, 0, 0, 0, 0, 0, 1, 0, 0),
]
BROKEN_PLANS = {
    "item dropped": lambda items: items.at[1].set(items[-1]),
    "item doubled": lambda items: items.at[-1].set(items[2]),
    "split doubled": lambda items: items.at[-1].set(items[4]),
    "row missed": moved("row_end", 2, -1),
    "row beyond": moved("row_end", 5, 1),
    "rows far beyond": lambda items: items.at[-1, :2].set(jnp.array([20, 24])),
    "key met twice": moved("kv_begin", 4, -1),
    "key missed": moved("kv_begin", 0, 1),
    "key beyond": moved("kv_end", 5, 1),
    "pages of another": moved("page_start", 2, 1),
    "split misnumbered": moved("split", 0, 1),
    "splits miscounted": moved("num_splits", 2, 1),
    "slot shared": moved("slot", slice(3, 6), -1),
}


@pytest.mark.parametrize("broken", BROKEN_PLANS.values(), ids=BROKEN_PLANS)
def test_oracle_catches_a_broken_plan(broken):
    small = next(c for c in SMOKE if c.op == "plan_decode")
    x = make_inputs(small)
    *table, ours_items = ours.make_call(small, x).run()
    items = jnp.array(SOUND_PLAN)
    oracle = make_oracle(small, x)
    assert oracle.error([*table, ours_items]) == oracle.error([*table, items]) == 0
    assert oracle.error([*table, broken(items)]) == 1


def test_in_place_calls_chain():
    call = ours.in_place(lambda x, y: (x + y,), (jnp.ones(3),), (jnp.ones(3),))
    assert [float(call.run()[0][0]) for _ in range(3)] == [2, 3, 4]


def test_kernel_times_takes_the_median_of_the_sums_in_turns():
    turns = []
    record = {"a": iter(range(100)), "b": iter([50.0] * 100)}

    def recorder(call):
        name = call.run()
        turns.append(name)
        return [float(next(record[name])), 1.0]

    calls = {name: Call(lambda name=name: name) for name in "ab"}
    times = timing.kernel_times(calls, "fake", recorder)
    assert turns[:4] == list("abab")
    first, rounds = timing.WARM_UP_ROUNDS, timing.ROUNDS
    assert rounds >= 20
    assert times["a"] == timing.Timing(first + (rounds - 1) / 2 + 1, 2, "fake")
    assert times["b"].us == 51


def test_a_round_that_lost_kernels_does_not_count():
    lost = iter([False] * 20 + [True] + [False] * 80)
    record = lambda call: [3.0] if next(lost) else [3.0, 4.0]
    times = timing.kernel_times({"a": Call(lambda: None)}, "fake", record)
    assert times["a"] == timing.Timing(7.0, 2, "fake")


def test_lost_kernels_are_an_error():
    with pytest.raises(RuntimeError, match="fake saw 0 kernels of a"):
        timing.kernel_times({"a": Call(lambda: None)}, "fake", lambda call: [])


def test_laps_by_the_clock_take_turns_and_last_long_enough(monkeypatch):
    monkeypatch.setattr(timing, "MIN_REPEAT_SECONDS", 0.05)
    ran = []

    def run(name, seconds):
        ran.append(name)
        time.sleep(seconds)

    calls = {name: Call(lambda n=name, s=s: run(n, s)) for name, s in (("a", 1e-3), ("b", 2e-2))}
    times = timing.wall_times(calls, repeats=2)
    laps = [(name, len(list(group))) for name, group in itertools.groupby(ran)]
    # One call and one short lap each come first; then as many steps for both as fill a lap of the faster.
    names, steps = zip(*laps[-4:])
    assert names == ("a", "b", "a", "b") and len(set(steps)) == 1
    assert timing.MIN_STEPS <= steps[0] <= 50
    assert 1e3 <= times["a"].us < times["b"].us


def test_loop_times_are_a_steps_by_clock_and_by_kernel():
    ran = []
    record = lambda call: [call.run()] * 8
    call = Call(lambda: ran.append("graph"), run_apart=lambda: 3.0)
    [timed] = timing.loop_times({"a": call}, 4, "fake", record).values()
    assert (timed.kernels, timed.kernel_us, timed.timer) == (2, 6.0, "wall")
    assert len(ran) == 1 + timing.LOOP_REPEATS * timing.LOOP_CALLS and 0 < timed.us < 1e5


def test_unknown_provider():
    with pytest.raises(ValueError, match="providers must be among"):
        providers.load("flashinfr")


@pytest.fixture(scope="module")
def smoke_results(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmarks") / "smoke.json"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "run", "--smoke"]
    command += ["--providers", "jaxattn,xla", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


ROW_FIELDS = {
    "op": str,
    "case": str,
    "provider": str,
    "dtype": str,
    "page_size": int | None,
    "num_qo_heads": int | None,
    "num_kv_heads": int | None,
    "head_dim": int | None,
    "us": float,
    "gbps": float,
    "tflops": float | None,
    "roof_share": float,
    "error": float,
    "ok": bool,
    "kernels": int | None,
    "timer": str,
    "kernel_us": float | None,
    "bytes": int,
    "flops": int | None,
    "work_model": str,
    "checked": str,
    "failure": None | str,
}


@pytest.mark.slow
def test_smoke_run_writes_what_the_schema_says(smoke_results):
    meta, rows = smoke_results["meta"], smoke_results["rows"]
    assert list(smoke_results) == ["meta", "rows"]
    assert {"gpu", "driver", "versions", "date", "command", "ceilings"} <= set(meta)
    assert meta["gpu"] == "cpu" and meta["failures"] == {} and meta["not_installed"] == {}
    assert meta["versions"]["jax"] == jax.__version__
    for row in rows:
        assert list(row) == list(ROW_FIELDS)
        for field, kind in ROW_FIELDS.items():
            assert isinstance(row[field], kind), (field, row)
        assert row["ok"] and row["us"] > 0 and row["timer"] == "wall"
    assert {row["op"] for row in rows} == {c.op for c in SMOKE}
    assert {row["provider"] for row in rows} == {"jaxattn", "jaxattn-separate", "xla"}


def scripted_run(monkeypatch, tmp_path, script, **options):
    """A run whose measuring processes say what the script has for the case they start with."""
    options = argparse.Namespace(out=tmp_path / "r.json", budget=options.get("budget", 1e9))
    run = benchmarks_run.Run(options, total=len(script))
    monkeypatch.setattr(run, "_worker", lambda ids, flags: iter(script[ids[0]]))
    return run


def test_a_case_that_takes_the_process_down_costs_only_itself(monkeypatch, tmp_path):
    row = dict(provider="jaxattn", us=1.0, ok=True)
    good = [{"row": row}, {"end": None}]
    script = {
        "a": [{"begin": "a"}, *good, {"begin": "b"}, {"row": row}, {"gone": "exit status 1"}],
        "c": [{"begin": "c"}, *good],
    }
    run = scripted_run(monkeypatch, tmp_path, script)
    run.measure(["a", "b", "c"], flags="")
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["meta"]["failures"] == {"b": "the process was lost: exit status 1"}
    assert len(written["rows"]) == 3


def test_a_process_that_does_not_start_is_an_error(monkeypatch, tmp_path):
    run = scripted_run(monkeypatch, tmp_path, {"a": [{"gone": "exit status 1"}]})
    with pytest.raises(RuntimeError, match="before its first case: exit status 1"):
        run.measure(["a"], flags="")


def test_out_of_budget_says_what_was_left_out(monkeypatch, tmp_path):
    script = {"a": [{"begin": "a"}, {"end": None}, {"gone": "out of budget"}]}
    run = scripted_run(monkeypatch, tmp_path, script, budget=0)
    run.measure(["a", "b"], flags="")
    assert run.meta["failures"] == {"b": "out of budget"}


def test_the_pages_tell_what_the_results_hold():
    """No number in their tables but from the files, no table left out, and each plot drawn."""
    root = Path(__file__).parents[1]
    pages = [root / "README.md", report.KEPT / "README.md"]
    tables = report.make_tables(report.read())
    text = "".join(page.read_text() for page in pages)
    for page in pages:
        assert report.fill(page.read_text(), tables) == page.read_text()
    assert all(f"<!-- benchmarks:{name} -->" in text for name in tables)
    plots = re.findall(r"!\[.*\]\((.*)\)", text)
    assert plots and all((root / plot).exists() for plot in plots)


@pytest.mark.slow
def test_report_fills_only_what_is_marked(smoke_results):
    tables = report.make_tables({"cpu": smoke_results})
    assert {"machine", "decode", "decode_step", "prefill", "rmsnorm"} <= set(tables)
    assert "summary" not in tables  # FlashInfer was not there
    text = (
        "a\n<!-- benchmarks:rope -->\nold\n<!-- /benchmarks:rope -->\nb\n<!-- benchmarks:decode -->"
    )
    filled = report.fill(text, tables)
    assert tables["rope"] in filled and "old" not in filled
    assert filled.startswith("a\n") and filled.endswith("b\n<!-- benchmarks:decode -->")
    assert report.fill(filled, tables) == filled


def fake_row(provider, us, op="decode", name="x", ok=True):
    row = dict(op=op, case=name, provider=provider, dtype="bfloat16", page_size=16)
    row |= dict(num_qo_heads=32, num_kv_heads=8, us=us, gbps=3600.0, tflops=100.0)
    return row | dict(roof_share=0.8, ok=ok, failure=None if ok else "wrong: error=1")


def fake_results(*rows):
    meta = dict(gpu="NVIDIA H200", driver="1", versions={}, date="2026-01-01T00:00", command="c")
    ceilings = dict(copy_gbps=4000.0, read_gbps=4000.0, matmul_tflops=800.0)
    return {"meta": meta | dict(seconds=1.0, ceilings=ceilings, failures={}), "rows": list(rows)}


def tables_of(results):
    return report.make_tables({"h200": results})


def test_flashinfer_in_a_summary_is_its_better_kernel():
    rows = [fake_row("jaxattn", 100.0), fake_row("flashinfer-cuda-cores", 300.0)]
    rows += [fake_row("flashinfer-tensor-cores", 50.0), fake_row("jax", 10.0)]
    tables = tables_of(fake_results(*rows))
    assert "| 0.50x |" in tables["decode"]
    assert "| decode | FlashInfer | 0 of 1 | 0.50x |" in tables["summary"]


def test_wrong_rows_are_shown_and_never_compared():
    rows = [fake_row("jaxattn", 100.0), fake_row("flashinfer-fa2", None, ok=False)]
    tables = tables_of(fake_results(*rows))
    assert "not timed" in tables["decode"] and "wrong: error=1" in tables["not_timed"]
    assert "summary" not in tables


def test_what_a_loop_takes_beyond_its_kernels():
    row = fake_row("jaxattn", 8400.0, op="decode_loop") | dict(kernel_us=8000.0, kernels=400)
    table = tables_of(fake_results(row))["decode_loop"]
    assert "| 8400 | 8000 | 400 | +5.0% |" in table and table.rstrip().endswith("| – | – | – |")


def test_what_a_loop_gains_by_fused_ops():
    ours, apart = (
        fake_row(name, us, op="decode_loop") | dict(kernel_us=8000.0, kernels=kernels)
        for name, us, kernels in (("jaxattn", 8000.0, 400), ("jaxattn-separate", 8800.0, 600))
    )
    table = tables_of(fake_results(ours, apart))["decode_loop"]
    assert table.rstrip().endswith("| 8800 | 600 | +10.0% |")


def test_a_loop_by_an_op_each_runs_no_fused_one():
    """Nor does it leave what it traced to the other."""
    loop = next(c for c in SMOKE if c.op == "decode_loop")
    inputs = make_inputs(loop)
    fused = {"jaxattn_rope_append_paged_kv_cache", "jaxattn_fused_add_rmsnorm"}
    for separate in (False, True, False):
        call = ours.make_call(loop, inputs, backend="interpret", separate=separate)
        names = set(re.findall(r"jaxattn_\w+", str(jax.make_jaxpr(call.run)())))
        assert names & fused == (set() if separate else fused)


def test_targets_are_carried_over_as_a_share_of_peak():
    # 1.6 of 2.04 TB/s is 78%; of an H200's 4.8 that is 3.76, and 3.6 misses it; of 4.0 it is 3.14.
    results = fake_results(fake_row("jaxattn", 1.0))
    assert (
        "| 3.76 of 4.8 TB/s | 3.60 TB/s, 75% (x 32/8 p16) | missed |"
        in tables_of(results)["targets"]
    )
    assert "| met |" in report.make_tables({"h200": results}, peak_tbps=4.0)["targets"]


def test_two_gpus_beside_each_other():
    rows = [fake_row("jaxattn", 100.0), fake_row("flashinfer", 150.0)]
    h200, h100 = fake_results(*rows), fake_results(*rows)
    h100["meta"] |= dict(gpu="NVIDIA H100 80GB HBM3", driver="2")
    tables = report.make_tables({"h200": h200, "h100": h100})
    assert tables["machine"].startswith("| GPU | NVIDIA H200 | NVIDIA H100 80GB HBM3 |")
    assert "| driver | 1 | 2 |" in tables["machine"]
    for name in ("summary", "decode"):
        gpus = re.findall(r"^\*\*(.*)\*\*$", tables[name], re.M)
        assert gpus == ["NVIDIA H200", "NVIDIA H100 80GB HBM3"] and tables[name].count("1.50x") >= 2
    # 78% of an H100's 3.35 TB/s is 2.63, which 3.6 meets.
    verdicts = re.findall(r"\| (met|missed) \|$", tables["targets"], re.M)
    assert verdicts == ["missed", "met"] and "| 2.63 of 3.35 TB/s |" in tables["targets"]
    assert "h200_speedup.png" in tables["plots"] and "h100_speedup.png" in tables["plots"]


@pytest.mark.slow
def test_plots_are_drawn(smoke_results, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.plots import draw

    draw(smoke_results, tmp_path, "cpu")
    assert {path.name for path in tmp_path.iterdir()} >= {"cpu_roofline.png", "cpu_speedup.png"}


def test_profile_names_our_kernels_and_leaves_the_clocks():
    command = profile.ncu_command(case("decode", "seed_profile"), smoke=False, export=None)
    assert command[:3] == ["ncu", "--clock-control", "none"]
    assert "regex:jaxattn_" in command


@pytest.mark.parametrize("op", tune.SPACES)
def test_tune_sweeps_fields_that_exist(op):
    module, space = tune.SPACES[op].module, tune.SPACES[op].fields
    config = typing.get_type_hints(module.default_config)["return"]
    assert set(space) <= {field.name for field in dataclasses.fields(config)}
    assert len(tune.candidates(op)) == np.prod([len(values) for values in space.values()])


def test_tune_takes_some_values():
    some = tune.candidates("decode", dict(num_warps=(2,), block_rows=(64,)))
    assert {(x["num_warps"], x["block_rows"]) for x in some} == {(2, 64)}
    assert len(some) == len(tune.candidates("decode")) // 3


def test_tune_refuses_what_has_no_tiles():
    with pytest.raises(ValueError, match="plan_decode has no tiles to tune; ops must be among"):
        tune.tune(next(c for c in SMOKE if c.op == "plan_decode"), None)


def test_tune_overrides_the_default_in_its_own_thread_only():
    module = tune.SPACES["rmsnorm"].module
    with tune._overridable(module):
        assert (
            tune._with({"num_warps": 2}, lambda: module.default_config(1, 4096, 1)).num_warps == 2
        )
        assert module.default_config(1, 4096, 1).num_warps != 2


@pytest.mark.parametrize(
    "text,kept",
    [
        ("no /home/someone/.cache/a-b/x.so: 3", "no x.so: 3"),
        ("at '/usr/lib/y.py'", "at 'y.py'"),
        ("csrc/a/z.cu, 1/2, see https://example.org/a/b", None),
    ],
)
def test_failures_name_files_without_the_folders_of_a_machine(text, kept):
    assert worker._short(OSError(text)) == f"OSError: {kept or text}"
