"""The compile report reads three texts of other tools; these are cut from real ones."""

import dataclasses

import pytest

from benchmarks import compile_cases, compiled
from benchmarks import compile_report as cr

THUNKS = """\
001: kCustomKernel [source       | next=002 (1)] jaxattn_prefill grid: [64, 8, 1] threads: [128, 1, 1]  shared_memory: 98304 bytes
002: kCustomKernel [prev=001 (1) | sink        ] loop_add_fusion grid: [128, 1, 1] threads: [128, 1, 1]  shared_memory: 0 bytes
"""  # noqa: E501

PTX = """\
.version 8.8
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];

.visible .entry loop_add_fusion(
)
{
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};
}
.visible .entry jaxattn_prefill(
	.param .u64 .ptr .global .align 32 jaxattn_prefill_param_0
)
.reqntid 128, 1, 1
{
	cp.async.cg.shared.global [ %r3 + 0 ], [ %rd20 + 0 ], 0x10, %r4;
	cp.async.ca.shared.global [ %r3 + 0 ], [ %rd20 + 0 ], 0x8, %r4;
	cp.async.commit_group;
	cp.async.wait_group 	0;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 1;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 1;
	wgmma.commit_group.sync.aligned;
}
"""

SERIALIZED = (
    "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are "
    "serialized due to insufficient register resources for the wgmma pipeline in the function "
    "'jaxattn_prefill' in line 1011"
)

SPILLED = f"""\
{SERIALIZED}
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'loop_add_fusion' for 'sm_90a'
ptxas info    : Function properties for loop_add_fusion
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
ptxas info    : Compile time = 1.368 ms
ptxas info    : Compiling entry function 'jaxattn_prefill' for 'sm_90a'
ptxas info    : Function properties for jaxattn_prefill
    2696 bytes stack frame, 4692 bytes spill stores, 4316 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 512 bytes smem
ptxas info    : Compile time = 86.368 ms
"""

CLEAN = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'jaxattn_prefill' for 'sm_90a'
ptxas info    : Function properties for jaxattn_prefill
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 162 registers, used 1 barriers
"""

LAUNCHES = compiled.parse_thunk_sequence(THUNKS)


def test_report_joins_the_three_texts():
    prefill = PTX.replace("loop_add_fusion", "other_kernel")
    assert compiled.kernel_reports(prefill, CLEAN, LAUNCHES) == [
        compiled.KernelReport(
            name="jaxattn_prefill",
            grid=(64, 8, 1),
            threads=128,
            registers=162,
            spill_stores=0,
            spill_loads=0,
            local_memory=0,
            static_shared=0,
            dynamic_shared=98304,
            wgmma=2,
            mma_sync=0,
            cp_async=2,
            warnings=(),
        )
    ]


def test_spills_and_serialised_wgmma_are_faults():
    [report] = compiled.kernel_reports(PTX, SPILLED, LAUNCHES)
    assert (report.spill_stores, report.spill_loads, report.local_memory) == (4692, 4316, 2696)
    assert (report.registers, report.static_shared) == (255, 512)
    assert report.faults == ("4692 + 4316 bytes spilled", SERIALIZED)


def test_a_case_accepts_one_kind_of_fault_only():
    [report] = compiled.kernel_reports(PTX, SPILLED, LAUNCHES)
    cold, hot = (compile_cases.Case("a", lambda: (abs, ()), hot=hot) for hot in (False, True))
    assert cold.faults(report) == [] and hot.faults(report) == list(report.faults)
    accepting = dataclasses.replace(hot, accepted="serialized")
    assert accepting.faults(report) == ["4692 + 4316 bytes spilled"]


def test_a_case_leaves_room_for_its_programs():
    [report] = compiled.kernel_reports(PTX, CLEAN, LAUNCHES)
    report = dataclasses.replace(report, threads=128, registers=128)
    case = compile_cases.Case("a", lambda: (abs, ()), programs=4)
    assert case.faults(report) == []
    fault = "129 registers, of 3 programs instead of 4"  # which are 136 of each thread's
    assert case.faults(dataclasses.replace(report, registers=129)) == [fault]


def test_clean_kernel_has_no_fault():
    [report] = compiled.kernel_reports(PTX, CLEAN, LAUNCHES)
    assert report.faults == ()


def test_warning_goes_to_the_kernel_it_names():
    usage = compiled.parse_ptxas(SPILLED)
    assert usage["loop_add_fusion"]["warnings"] == ()
    assert usage["jaxattn_prefill"]["warnings"] == (SERIALIZED,)


def test_table_marks_hot_cases():
    [report] = compiled.kernel_reports(PTX, SPILLED, LAUNCHES)
    hot, cold = (
        compile_cases.Case(name, lambda: (abs, ()), hot)
        for name, hot in [("a", True), ("b", False)]
    )
    head, first, second = cr.format_table([(hot, report), (cold, report)]).splitlines()
    assert head.split()[:3] == ["case", "kernel", "threads"]
    assert first.split() == "a * prefill 128 255 4692/4316 2696 512+98304 2 0 2 C7511".split()
    assert second.split()[:2] == ["b", "prefill"]


def test_cases_have_names_of_their_own_and_some_are_hot():
    names = [case.name for case in compile_cases.CASES]
    assert len(set(names)) == len(names)
    assert any(case.hot for case in compile_cases.CASES)


def test_unknown_target():
    with pytest.raises(ValueError, match=r"target must be one of \['a100', 'h200'\]"):
        compiled.compile_for("b300", abs)


def test_unmatched_filter(capsys):
    with pytest.raises(SystemExit):
        cr.main(["--only", "no such case"])
    assert "no case matches --only 'no such case'" in capsys.readouterr().err
