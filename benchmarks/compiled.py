"""Compiles a program for a GPU that is not here, and reads what became of this library's kernels in it.

XLA compiles for a device that a text file describes (benchmarks/targets/), through Triton, down to PTX; the assembler
compiles that PTX once more and says what it used. Both come with `jax-cuda13-plugin[with-cuda]` (or cuda12) of JAX's
own version. Where each number comes from:

- registers, spills, local and static shared memory, warnings: `ptxas -v` on the PTX XLA dumped;
- grid, threads, dynamic shared memory: XLA's thunk sequence, that is, what it will launch with;
- wgmma, mma.sync, cp.async: instructions in the PTX, each counted once, loop or no loop.

The Hopper kernels come through Mosaic, which assembles them itself and dumps all of that, the machine code too: there
spills count in the loops that multiply alone, since the warpgroups of a kernel share one number of registers at its
beginning and have others later.
"""

import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from benchmarks.sass import product_loops

TARGETS = Path(__file__).parent / "targets"
ARCHITECTURES = {"h200": "sm_90a", "a100": "sm_80"}
REGISTERS = 65536  # of a multiprocessor; a thread gets eight at a time
KERNEL_PREFIX = "jaxattn_"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelReport:
    """One compiled kernel; memory in bytes, registers and local memory per thread."""

    name: str
    grid: tuple[int, int, int]
    threads: int
    registers: int
    spill_stores: int
    spill_loads: int
    local_memory: int
    static_shared: int
    dynamic_shared: int
    wgmma: int
    mma_sync: int
    cp_async: int
    warnings: tuple[str, ...]
    loop_spills: int | None = None  # in the loops that multiply, where the machine code is known

    @property
    def programs(self) -> int:
        """How many a multiprocessor holds the registers of."""
        return REGISTERS // (self.threads * (-(-self.registers // 8) * 8))

    @property
    def spills(self) -> tuple[str, ...]:
        if self.loop_spills is not None:
            spilled = self.loop_spills
            return (f"{spilled} spills in a loop of products",) if spilled else ()
        spilled = self.spill_stores + self.spill_loads
        return (f"{self.spill_stores} + {self.spill_loads} bytes spilled",) if spilled else ()

    @property
    def faults(self) -> tuple[str, ...]:
        """What a hot kernel must not show."""
        wrong = ("serialized", "setmaxnreg")
        return self.spills + tuple(x for x in self.warnings if any(word in x for word in wrong))


def compile_for(
    target: str, fn: Callable[..., Any], *args: Any, mosaic: bool = False
) -> list[KernelReport]:
    """Compiles `jit(fn)` for a described GPU and reports on each of this library's kernels in it.

    Args:
      target: "h200" or "a100".
      fn: any function of JAX arrays.
      *args: pytrees of arrays or `jax.ShapeDtypeStruct`s.
      mosaic: report on kernels that come through Mosaic.

    Raises:
      RuntimeError: no CUDA plugin or no ptxas here, or ptxas rejects the PTX.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        _mosaic_dumps(folder) if mosaic else nullcontext(),
    ):
        # The dumped HLO is small; `ptx` alone keeps out the megabytes of Triton's passes.
        lower_for(target, fn, *args).compile(
            compiler_options={"xla_dump_to": folder, "xla_dump_emitter_re": "ptx"}
        )
        launches: dict[str, Launch] = {}
        for path in Path(folder).glob("*thunk_sequence.txt"):
            launches |= parse_thunk_sequence(path.read_text())
        reports = []
        for path in sorted(Path(folder).glob("*.ptx")):
            ptx = path.read_text()
            if (machine_code := path.with_suffix(".sass_ctrl")).exists():
                reports.append(mosaic_report(ptx, machine_code))
            elif KERNEL_PREFIX in ptx:
                reports += kernel_reports(ptx, _assemble(path, ARCHITECTURES[target]), launches)
    return reports


def lower_for(target: str, fn: Callable[..., Any], *args: Any) -> jax.stages.Lowered:
    """`jit(fn)` lowered for a described GPU, ready to compile; arguments and errors as `compile_for`'s."""
    mesh = described_mesh(target)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    structs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), args
    )
    with jax.sharding.set_mesh(mesh):
        return jax.jit(fn).lower(*structs)


@dataclasses.dataclass(frozen=True)
class Launch:
    grid: tuple[int, int, int]
    threads: int
    dynamic_shared: int


def kernel_reports(ptx: str, ptxas_log: str, launches: dict[str, Launch]) -> list[KernelReport]:
    """Joins the three sources for each of this library's kernels in one PTX file."""
    usage = parse_ptxas(ptxas_log)
    reports = []
    for name, body in split_ptx(ptx).items():
        if name.startswith(KERNEL_PREFIX):
            launch = launches[name]
            reports.append(
                KernelReport(
                    name=name,
                    grid=launch.grid,
                    threads=launch.threads,
                    dynamic_shared=launch.dynamic_shared,
                    **count_instructions(body),
                    **usage[name],
                )
            )
    return reports


def mosaic_report(ptx: str, machine_code: Path) -> KernelReport:
    """Of a kernel that Mosaic dumped: its PTX, and beside the machine code what the assembler and the lowering said."""
    ((name, body),) = split_ptx(ptx).items()
    usage = parse_ptxas(machine_code.with_suffix(".ptxas").read_text())[name]
    resources = machine_code.with_suffix(".resources.txt").read_text()
    shared = re.search(r"smem_scratch_bytes=(\d+)", resources)
    threads = re.search(r"\.(?:max|req)ntid (\d+)", ptx)
    return KernelReport(
        name=name.removesuffix("_mosaic_gpu_kernel"),
        grid=(0, 0, 0),
        threads=int(threads[1]) if threads else 0,
        dynamic_shared=int(shared[1]) if shared else 0,
        loop_spills=sum(loop.spills for loop in product_loops(machine_code.read_text())),
        **count_instructions(body),
        **usage,
    )


# Where Mosaic dumps to is one setting of the process; only what dumps waits for another.
_dumping = threading.Lock()


@contextmanager
def _mosaic_dumps(folder: str) -> Iterator[None]:
    with _dumping:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        try:
            yield
        finally:
            del os.environ["MOSAIC_GPU_DUMP_TO"]


def parse_thunk_sequence(text: str) -> dict[str, Launch]:
    """`NAME grid: [x, y, z] threads: [x, y, z]  shared_memory: N bytes` lines of XLA's dump."""
    pattern = re.compile(
        r"(\S+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), (\d+), (\d+)\]"
        r"\s+shared_memory: (\d+) bytes"
    )
    launches = {}
    for name, *numbers in pattern.findall(text):
        x, y, z, tx, ty, tz, shared = map(int, numbers)
        launches[name] = Launch((x, y, z), tx * ty * tz, shared)
    return launches


def split_ptx(ptx: str) -> dict[str, str]:
    """The text of each `.entry` of a PTX file, from its name to the next one's."""
    _, *pieces = re.split(r"\.entry\s+", ptx)
    return {re.match(r"\w+", piece)[0]: piece for piece in pieces}  # type: ignore[index]


def count_instructions(body: str) -> dict[str, Any]:
    """Tensor-core and asynchronous-copy instructions of one kernel's PTX."""
    return {
        "wgmma": len(re.findall(r"\bwgmma\.mma_async\b", body)),
        "mma_sync": len(re.findall(r"\bmma\.sync\b", body)),
        # Not cp.async.commit_group or cp.async.wait_group.
        "cp_async": len(re.findall(r"\bcp\.async\.(?:ca|cg|bulk)\b", body)),
    }


def parse_ptxas(log: str) -> dict[str, dict[str, Any]]:
    """The fields that `ptxas -v` prints for each entry function, and its warnings about it.

    A warning is printed before the function's own lines and names it, or follows them.
    """
    usage: dict[str, dict[str, Any]] = {}
    sections = re.split(r"ptxas info\s*: Compiling entry function '(\w+)'.*\n", log)
    for name, section in zip(sections[1::2], sections[2::2], strict=True):

        def number(pattern: str, section: str = section) -> int:
            found = re.search(pattern, section)
            return int(found[1]) if found else 0

        usage[name] = {
            "registers": number(r"Used (\d+) registers"),
            "spill_stores": number(r"(\d+) bytes spill stores"),
            "spill_loads": number(r"(\d+) bytes spill loads"),
            "local_memory": number(r"(\d+) bytes stack frame"),
            "static_shared": number(r"(\d+) bytes smem"),
            "warnings": tuple(
                line.strip()
                for line in log.splitlines()
                if re.search(r"\(C\d+\)|warning", line) and (name in line or line in section)
            ),
        }
    return usage


@functools.cache
def described_mesh(target: str) -> jax.sharding.Mesh:
    """Of one GPU that is described, not there; plans made under it are for this GPU. Errors as `compile_for`'s."""
    if target not in ARCHITECTURES:
        raise ValueError(f"target must be one of {sorted(ARCHITECTURES)}; got {target=}")
    description = (TARGETS / f"{target}.txtpb").read_text()
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=description, topology="1x1x1"
        )
    except Exception as error:
        raise RuntimeError(
            "compiling for a GPU needs JAX's CUDA plugin, also where there is no GPU: "
            f"pip install 'jax-cuda13-plugin[with-cuda]=={jax.__version__}'"
        ) from error
    return topologies.make_mesh(topology, (1,), ("x",))


@functools.cache
def _ptxas() -> str:
    """The assembler of NVIDIA's wheel (CUDA 13's, or CUDA 12's), else the one on PATH or in CUDA's usual place."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        for place in ("cu13/bin/ptxas", "cuda_nvcc/bin/ptxas"):
            if (path := Path(root) / place).exists():
                return str(path)
    elsewhere = shutil.which("ptxas") or shutil.which("ptxas", path="/usr/local/cuda/bin")
    if elsewhere is None:
        raise RuntimeError("no ptxas: install nvidia-cuda-nvcc, or put a CUDA toolkit's on PATH")
    return elsewhere


def _assemble(ptx: Path, architecture: str) -> str:
    command = [_ptxas(), "-v", f"-arch={architecture}", str(ptx), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas rejects {ptx.name}:\n{done.stderr}")
    return done.stdout + done.stderr
