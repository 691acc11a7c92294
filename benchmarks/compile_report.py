"""What the compiler made of each kernel, for an H200 or an A100, on a machine without a GPU.

    python -m benchmarks.compile_report [--target h200|a100] [--only SUBSTR] [--json FILE] [--check]

XLA compiles for a device that a text file describes (benchmarks/targets/), through Triton, down to
PTX; the assembler compiles that PTX once more and says what it used. Both come with
`jax-cuda13-plugin[with-cuda]` (or cuda12) of JAX's own version. Where each number comes from:

- registers, spills, local and static shared memory, warnings: `ptxas -v` on the PTX XLA dumped;
- grid, threads, dynamic shared memory: XLA's thunk sequence, that is, what it will launch with;
- wgmma, mma.sync, cp.async: instructions in the PTX, each counted once, loop or no loop.

The Hopper kernels come through Mosaic, which assembles them itself and dumps all of that, the machine code too: there
spills count in the loops that multiply alone, since the warpgroups of a kernel share one number of registers at its
beginning and have others later.

`--check` fails on a spill or a serialised wgmma in a case marked hot, and compiles only those.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import jaxattn as ja
from benchmarks.sass import product_loops
from jaxattn.grouped_matmul import Groups, grouped_matmul

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
    mesh = _target_mesh(target)
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
def _target_mesh(target: str) -> jax.sharding.Mesh:
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


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration that users hit; `build` gives a function and the shapes to compile it for."""

    name: str
    build: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
    hot: bool = False
    # Part of a fault that is none here: what does not show it was measured, and is slower.
    accepted: str = ""
    mosaic: bool = False
    targets: tuple[str, ...] = tuple(ARCHITECTURES)  # that have what it needs
    programs: int = 1  # that a multiprocessor must hold the registers of

    def faults(self, kernel: KernelReport) -> list[str]:
        """What this case's kernel must not show, and shows."""
        found = [
            fault
            for fault in kernel.faults
            if self.hot and not (self.accepted and self.accepted in fault)
        ]
        if kernel.programs < self.programs:
            found.append(
                f"{kernel.registers} registers, of {kernel.programs} programs instead of {self.programs}"
            )
        return found


def _struct(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _paged_kv(
    batch: int,
    kv_len: int,
    page_size: int,
    num_kv_heads: int,
    d: int,
    dtype: Any,
    dv: int | None = None,
    scales: str | None = None,
):
    """A cache with just the pages that `batch` requests of `kv_len` tokens need, and its table."""
    pages = batch * -(-kv_len // page_size)
    return jax.eval_shape(
        lambda: (
            ja.PagedKVCache.zeros(
                pages,
                page_size,
                num_kv_heads,
                d,
                dtype,
                head_dim_v=dv,
                scales=ja.KVScales.of(1.0, 1.0) if scales == "tensor" else scales,
            ),
            ja.PageTable(
                jnp.zeros(batch + 1, jnp.int32),
                jnp.zeros(pages, jnp.int32),
                jnp.zeros(batch, jnp.int32),
                page_size,
            ),
        )
    )


def _operands(heads: int, sinks: bool, alibi: bool) -> dict[str, Any]:
    names = ["sinks"] * sinks + ["alibi_slopes"] * alibi
    return {name: _struct(heads, dtype=jnp.float32) for name in names}


def _decode(
    heads: int,
    kv_heads: int,
    d: int,
    page_size: int,
    dtype: Any = jnp.bfloat16,
    *,
    kv: Any = None,
    scales: str | None = None,
    dv: int | None = None,
    window: int | None = None,
    cap: float | None = None,
    sinks: bool = False,
    alibi: bool = False,
):
    def step(q, cache, table, operands):
        plan = ja.plan_decode(table, num_qo_heads=heads, num_kv_heads=kv_heads, window_left=window)
        return ja.paged_decode(q, cache, plan, logits_soft_cap=cap, **operands)

    cache, table = _paged_kv(64, 8192, page_size, kv_heads, d, kv or dtype, dv, scales)
    q = _struct(64, heads, d, dtype=dtype)
    return step, (q, cache, table, _operands(heads, sinks, alibi))


def _prefill(
    heads: int,
    kv_heads: int,
    d: int,
    page_size: int,
    dtype: Any = jnp.bfloat16,
    *,
    batch: int = 4,
    new: int = 4096,
    kv: Any = None,
    scales: str | None = None,
    dv: int | None = None,
    causal: bool | None = None,
    window: int | None = None,
    cap: float | None = None,
    sinks: bool = False,
    alibi: bool = False,
    mask: bool = False,
    spans: bool = False,
    backend: str = "triton",
):
    tokens = batch * new
    cache, table = _paged_kv(batch, 4096, page_size, kv_heads, d, kv or dtype, dv, scales)
    bits = jax.eval_shape(
        lambda: ja.MaskBits(jnp.zeros(tokens * 512, jnp.uint8), jnp.zeros(batch + 1, jnp.int32))
    )

    def planned(qo_indptr, table, mask, spans):
        return ja.plan_prefill(
            qo_indptr,
            table,
            num_qo_tokens=tokens,
            num_qo_heads=heads,
            num_kv_heads=kv_heads,
            causal=causal,
            window_left=window,
            mask=mask,
            bidirectional_spans=spans,
        )

    def step(q, cache, plan, operands):
        return ja.paged_prefill(q, cache, plan, logits_soft_cap=cap, backend=backend, **operands)

    see = (bits if mask else None, _struct(tokens, 2) if spans else None)
    plan = jax.eval_shape(planned, _struct(batch + 1), table, *see)
    q = _struct(tokens, heads, d, dtype=dtype)
    return step, (q, cache, plan, _operands(heads, sinks, alibi))


def _ragged_prefill(
    heads: int, kv_heads: int, d: int, dtype: Any = jnp.bfloat16, backend: str = "triton"
):
    tokens = 16384

    def planned(indptr):
        return ja.plan_ragged_prefill(
            indptr, indptr, num_qo_tokens=tokens, num_qo_heads=heads, num_kv_heads=kv_heads
        )

    def step(q, k, v, plan):
        return ja.ragged_prefill(q, k, v, plan, backend=backend)

    kv = _struct(tokens, kv_heads, d, dtype=dtype)
    return step, (
        _struct(tokens, heads, d, dtype=dtype),
        kv,
        kv,
        jax.eval_shape(planned, _struct(5)),
    )


def _dense(
    heads: int,
    kv_heads: int,
    d: int,
    tokens: int,
    mask: tuple[int, int] | None = None,
    dtype: Any = jnp.bfloat16,
    backend: str = "triton",
):
    """`dot_product_attention` of 32 requests; mask: which keys take part, its B and T, none: their lengths."""
    how: dict[str, Any] = dict(is_causal=tokens > 1, backend=backend)
    batch, length = 32, 4096
    operands = dict(key_value_seq_lengths=_struct(batch))
    if mask is not None:
        operands = dict(mask=_struct(mask[0], 1, mask[1], length, dtype=jnp.bool_))

    def step(q, k, v, operands):
        return ja.dot_product_attention(q, k, v, **operands, **how)

    kv = _struct(batch, length, kv_heads, d, dtype=dtype)
    return step, (_struct(batch, tokens, heads, d, dtype=dtype), kv, kv, operands)


def _merge_state(d: int, dtype: Any = jnp.bfloat16):
    v, s = _struct(4096, 32, d, dtype=dtype), _struct(4096, 32, dtype=jnp.float32)
    return ja.merge_state, (v, s, v, s)


def _merge_states(d: int, dtype: Any = jnp.bfloat16):
    return ja.merge_states, (
        _struct(4096, 8, 32, d, dtype=dtype),
        _struct(4096, 8, 32, dtype=jnp.float32),
    )


def _rmsnorm(hidden: int, dtype: Any = jnp.bfloat16):
    return ja.rmsnorm, (_struct(4096, hidden, dtype=dtype), _struct(hidden, dtype=dtype))


def _fused_add_rmsnorm(hidden: int, dtype: Any = jnp.bfloat16):
    x = _struct(4096, hidden, dtype=dtype)
    return ja.fused_add_rmsnorm, (x, x, _struct(hidden, dtype=dtype))


def _activation(op: str, dtype: Any = jnp.bfloat16):
    return getattr(ja, op), (_struct(4096, 2 * 14336, dtype=dtype),)


ALL_LIMITS: dict[str, Any] = dict(temperature=None, top_k=None, top_p=None, min_p=None)


def _sampling(vocab: int, logits: bool, dtype: Any = jnp.float32, **limits: None):
    """Each row with limits of its own."""
    batch = 32
    names = list(limits)
    dtypes = {"top_k": jnp.int32}
    arrays = [_struct(batch, dtype=dtypes.get(name, jnp.float32)) for name in names]

    def draw(rows, *arrays):
        key = jax.random.key(0)
        given = dict(zip(names, arrays, strict=True))
        if logits:
            return ja.sampling_from_logits(rows, key, **given)
        if names == ["top_k", "top_p"]:
            return ja.top_k_top_p_sampling_from_probs(rows, arrays[0], arrays[1], key)
        if names:
            return ja.top_p_sampling_from_probs(rows, arrays[0], key)
        return ja.sampling_from_probs(rows, key)

    return draw, (_struct(batch, vocab, dtype=dtype), *arrays)


def _rope_cache(heads: int, kv_heads: int, d: int, is_neox: bool = True, dtype: Any = jnp.bfloat16):
    def step(positions, query, key, cos_sin_cache):
        return ja.apply_rope_with_cos_sin_cache(
            positions, query, key, d, cos_sin_cache, is_neox=is_neox
        )

    query, key = (_struct(4096, h * d, dtype=dtype) for h in (heads, kv_heads))
    return step, (_struct(4096), query, key, _struct(8192, d, dtype=jnp.float32))


def _rope_pos_ids(heads: int, kv_heads: int, d: int, dtype: Any = jnp.bfloat16):
    query, key = (_struct(4096, h, d, dtype=dtype) for h in (heads, kv_heads))
    return ja.apply_llama31_rope_pos_ids, (query, key, _struct(4096))


def _rope_append(
    heads: int,
    kv_heads: int,
    d: int,
    norm: bool = False,
    apart: bool = False,
    dtype: Any = jnp.bfloat16,
    *,
    kv: Any = None,
    scales: str | None = None,
):
    cache, table = _paged_kv(64, 8192, 16, kv_heads, d, kv or dtype, None, scales)
    weights = {f"{x}_norm_weight": _struct(d, dtype=dtype) for x in ("q", "k") if norm}

    def step(qkv, batch_indices, positions, cos_sin_cache, cache, table, weights):
        where = (batch_indices, positions, cos_sin_cache, cache, table)
        return ja.rope_append_paged_kv_cache(qkv, *where, **weights)

    qkv: Any = _struct(4096, (heads + 2 * kv_heads) * d, dtype=dtype)
    if apart:
        qkv = tuple(_struct(4096, h * d, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    cos_sin_cache = _struct(8192, d, dtype=jnp.float32)
    return step, (qkv, _struct(4096), _struct(4096), cos_sin_cache, cache, table, weights)


def _append(
    kv_heads: int,
    d: int,
    page_size: int,
    dtype: Any = jnp.bfloat16,
    *,
    kv: Any = None,
    scales: str | None = None,
):
    cache, table = _paged_kv(64, 8192, page_size, kv_heads, d, kv or dtype, None, scales)
    kv = _struct(4096, kv_heads, d, dtype=dtype)
    return ja.append_paged_kv_cache, (kv, kv, _struct(4096), _struct(4096), cache, table)


def _grouped(tokens: int, repeat: int, groups: int, outs: int, size: int, dtype=jnp.bfloat16):
    weights = _struct(groups, outs, size, dtype=dtype)
    of_rows = Groups._make([_struct(tokens * repeat), _struct(groups)])
    return grouped_matmul, (_struct(tokens, size, dtype=dtype), weights, of_rows)


def _case(
    name: str,
    build: Callable[..., Any],
    *args: Any,
    hot: bool = False,
    accepted: str = "",
    targets: tuple[str, ...] = tuple(ARCHITECTURES),
    programs: int = 1,
    **kwargs: Any,
):
    mosaic = kwargs.get("backend") == "mosaic"
    build = functools.partial(build, *args, **kwargs)
    return Case(name, build, hot, accepted, mosaic, targets, programs)


MOSAIC: dict[str, Any] = dict(backend="mosaic", targets=("h200",))
# An A100 does not convert e4m3.
FP8: dict[str, Any] = dict(kv=jnp.float8_e4m3fn, scales="tensor", targets=("h200",))
FP8_TOKEN: dict[str, Any] = FP8 | dict(scales="token")
E5M2: dict[str, Any] = dict(kv=jnp.float8_e5m2)

# 255 registers hold the 128-row tile but for two values.
TWO = "8 + 8 bytes"

# Names: heads/KV heads, d head_dim, p page size; prefill is 4 x 4096 tokens unless it says so.
CASES = (
    _case("decode bf16 32/8 d128 p1", _decode, 32, 8, 128, 1, hot=True),
    _case("decode bf16 32/8 d128 p16", _decode, 32, 8, 128, 16, hot=True),
    _case("decode fp16 32/8 d128 p16", _decode, 32, 8, 128, 16, jnp.float16, hot=True),
    _case("decode fp32 32/8 d128 p16", _decode, 32, 8, 128, 16, jnp.float32),
    _case("decode fp32 32/8 d256 p16", _decode, 32, 8, 256, 16, jnp.float32),
    _case("decode bf16 128/1 d128 p16", _decode, 128, 1, 128, 16),
    _case("decode bf16 32/32 d128 p16", _decode, 32, 32, 128, 16, hot=True),
    _case("decode bf16 8/1 d128 p16", _decode, 8, 1, 128, 16, hot=True),
    _case("decode bf16 32/8 d64 p16", _decode, 32, 8, 64, 16, hot=True),
    _case("decode bf16 32/8 d80 p16", _decode, 32, 8, 80, 16),
    _case("decode bf16 32/8 d256 p16", _decode, 32, 8, 256, 16),
    _case("prefill bf16 32/8 d128 p1", _prefill, 32, 8, 128, 1, hot=True),
    _case("prefill bf16 32/8 d128 p16", _prefill, 32, 8, 128, 16, hot=True, accepted=TWO),
    _case(
        "prefill fp16 32/8 d128 p16", _prefill, 32, 8, 128, 16, jnp.float16, hot=True, accepted=TWO
    ),
    _case("prefill fp32 32/8 d128 p16", _prefill, 32, 8, 128, 16, jnp.float32),
    _case("prefill fp32 32/8 d256 p16", _prefill, 32, 8, 256, 16, jnp.float32),
    _case("prefill bf16 32/32 d128 p16", _prefill, 32, 32, 128, 16, hot=True, accepted=TWO),
    _case("prefill bf16 32/4 d128 p16", _prefill, 32, 4, 128, 16),
    _case("prefill bf16 32/8 d64 p16", _prefill, 32, 8, 64, 16, hot=True, accepted="serialized"),
    _case("prefill bf16 32/8 d80 p16", _prefill, 32, 8, 80, 16),
    _case("prefill bf16 32/8 d256 p16", _prefill, 32, 8, 256, 16),
    _case("prefill bf16 32/8 d128 p16 32x4", _prefill, 32, 8, 128, 16, batch=32, new=4, hot=True),
    _case("prefill bf16 32/8 d128 p16 8x4", _prefill, 32, 8, 128, 16, batch=8, new=4, hot=True),
    _case("prefill bf16 32/8 d64 p16 32x16", _prefill, 32, 8, 64, 16, batch=32, new=16, hot=True),
    _case("prefill bf16 32/8 d256 p16 32x16", _prefill, 32, 8, 256, 16, batch=32, new=16),
    _case("prefill bf16 32/32 d128 p16 32x4", _prefill, 32, 32, 128, 16, batch=32, new=4),
    _case(
        "prefill bf16 32/8 d128 p16 8x128",
        _prefill,
        32,
        8,
        128,
        16,
        batch=8,
        new=128,
        hot=True,
        accepted=TWO,
    ),
    _case("ragged bf16 32/8 d128", _ragged_prefill, 32, 8, 128, hot=True),
    _case("ragged fp16 32/8 d128", _ragged_prefill, 32, 8, 128, jnp.float16),
    _case("ragged bf16 32/32 d64", _ragged_prefill, 32, 32, 64),
    # The Hopper lowering.
    _case("mosaic bf16 32/8 d128 p1", _prefill, 32, 8, 128, 1, hot=True, **MOSAIC),
    _case("mosaic bf16 32/8 d128 p16", _prefill, 32, 8, 128, 16, hot=True, **MOSAIC),
    _case("mosaic bf16 32/8 d128 p128", _prefill, 32, 8, 128, 128, **MOSAIC),
    _case("mosaic fp16 32/8 d64 p16", _prefill, 32, 8, 64, 16, jnp.float16, hot=True, **MOSAIC),
    _case("mosaic bf16 32/8 d256 p16", _prefill, 32, 8, 256, 16, hot=True, **MOSAIC),
    _case("mosaic gemma3 32/16 d128 w1024", _prefill, 32, 16, 128, 16, window=1023, **MOSAIC),
    _case("mosaic gemma2 16/8 d256 cap", _prefill, 16, 8, 256, 16, cap=50.0, **MOSAIC),
    _case("mosaic gpt-oss 64/8 d64 sinks", _prefill, 64, 8, 64, 16, sinks=True, **MOSAIC),
    _case("mosaic bf16 40/8 d128 p16", _prefill, 40, 8, 128, 16, **MOSAIC),
    _case("mosaic bf16 32/8 d128 p16 no mask", _prefill, 32, 8, 128, 16, causal=False, **MOSAIC),
    _case("mosaic ragged bf16 32/8 d128", _ragged_prefill, 32, 8, 128, hot=True, **MOSAIC),
    _case("mosaic dense bf16 32/8 d128", _dense, 32, 8, 128, 1024, **MOSAIC),
    _case("mosaic fp8 32/8 d128 p16", _prefill, 32, 8, 128, 16, hot=True, **(FP8 | MOSAIC)),
    _case(
        "mosaic fp8 32/8 d128 p16 token", _prefill, 32, 8, 128, 16, hot=True, **(FP8_TOKEN | MOSAIC)
    ),
    _case("mosaic fp8 fp16 32/8 d64 p16", _prefill, 32, 8, 64, 16, jnp.float16, **(FP8 | MOSAIC)),
    # Dense caches: by lengths, by a mask of keys, by one of queries and keys.
    _case("dense decode bf16 32/8 d128", _dense, 32, 8, 128, 1, hot=True),
    _case("dense decode bf16 32/8 d128 key mask", _dense, 32, 8, 128, 1, (32, 1), hot=True),
    _case("dense prefill bf16 32/8 d128", _dense, 32, 8, 128, 1024, hot=True),
    _case("dense prefill bf16 32/8 d128 key mask", _dense, 32, 8, 128, 1024, (32, 1)),
    _case("dense prefill bf16 32/8 d128 mask", _dense, 32, 8, 128, 256, (1, 256)),
    # gpt-oss; Gemma 3 27B, local layers; Gemma 2 9B, local and global ones.
    _case(
        "decode gpt-oss 64/8 d64 w128 sinks",
        _decode,
        64,
        8,
        64,
        16,
        window=127,
        sinks=True,
        hot=True,
    ),
    _case("decode gemma3 32/16 d128 w1024", _decode, 32, 16, 128, 16, window=1023, hot=True),
    _case("decode gemma2 16/8 d256 cap", _decode, 16, 8, 256, 16, cap=50.0, hot=True),
    _case("decode bf16 32/8 d128 p16 alibi", _decode, 32, 8, 128, 16, alibi=True),
    _case("decode bf16 16/16 d192 v128", _decode, 16, 16, 192, 16, dv=128),
    _case("decode bf16 16/1 d512 v256", _decode, 16, 1, 512, 16, dv=256),
    _case("prefill gpt-oss 64/8 d64 w128 sinks", _prefill, 64, 8, 64, 16, window=127, sinks=True),
    _case("prefill gpt-oss 64/8 d64 sinks", _prefill, 64, 8, 64, 16, sinks=True),
    _case("prefill gemma3 32/16 d128 w1024", _prefill, 32, 16, 128, 16, window=1023),
    _case("prefill gemma2 16/8 d256 cap", _prefill, 16, 8, 256, 16, cap=50.0),
    _case("prefill bf16 32/8 d128 p16 no mask", _prefill, 32, 8, 128, 16, causal=False),
    _case("prefill bf16 32/8 d128 p16 cap", _prefill, 32, 8, 128, 16, cap=50.0),
    _case("prefill bf16 32/8 d128 p16 alibi", _prefill, 32, 8, 128, 16, alibi=True),
    _case("prefill bf16 32/8 d128 p16 mask bits", _prefill, 32, 8, 128, 16, mask=True),
    _case("prefill bf16 32/8 d128 p16 spans", _prefill, 32, 8, 128, 16, spans=True),
    _case("prefill bf16 16/16 d192 v128", _prefill, 16, 16, 192, 16, dv=128),
    _case("prefill bf16 16/1 d512 v256", _prefill, 16, 1, 512, 16, dv=256),
    # FP8 caches: scales for all, or for each token and head.
    _case("decode fp8 32/8 d128 p1", _decode, 32, 8, 128, 1, hot=True, programs=4, **FP8),
    _case("decode fp8 32/8 d128 p16", _decode, 32, 8, 128, 16, hot=True, programs=4, **FP8),
    _case("decode fp8 32/8 d128 p64", _decode, 32, 8, 128, 64, hot=True, programs=4, **FP8),
    _case(
        "decode fp8 32/8 d128 p1 token", _decode, 32, 8, 128, 1, hot=True, programs=4, **FP8_TOKEN
    ),
    _case(
        "decode fp8 32/8 d128 p16 token", _decode, 32, 8, 128, 16, hot=True, programs=4, **FP8_TOKEN
    ),
    _case(
        "decode fp8 32/8 d128 p64 token", _decode, 32, 8, 128, 64, hot=True, programs=4, **FP8_TOKEN
    ),
    _case("decode fp8 32/32 d128 p16", _decode, 32, 32, 128, 16, **FP8),
    _case("decode fp8 8/1 d128 p16", _decode, 8, 1, 128, 16, **FP8),
    _case("decode fp8 32/8 d64 p16", _decode, 32, 8, 64, 16, **FP8),
    _case("decode fp8 32/8 d256 p16", _decode, 32, 8, 256, 16, **FP8),
    _case("decode fp8 128/1 d128 p16", _decode, 128, 1, 128, 16, **FP8),
    _case("decode fp8 64/8 d64 w128 sinks", _decode, 64, 8, 64, 16, window=127, sinks=True, **FP8),
    _case("decode fp8 16/8 d256 cap", _decode, 16, 8, 256, 16, cap=50.0, **FP8),
    _case("decode e5m2 32/8 d128 p16", _decode, 32, 8, 128, 16, **E5M2),
    _case("prefill fp8 32/8 d128 p1", _prefill, 32, 8, 128, 1, **FP8),
    _case("prefill fp8 32/8 d128 p16", _prefill, 32, 8, 128, 16, **FP8),
    _case("prefill fp8 32/8 d128 p64", _prefill, 32, 8, 128, 64, **FP8),
    _case("prefill fp8 32/8 d128 p16 token", _prefill, 32, 8, 128, 16, **FP8_TOKEN),
    _case("prefill fp8 32/8 d128 p16 8x4", _prefill, 32, 8, 128, 16, batch=8, new=4, **FP8),
    _case("prefill fp8 32/8 d128 p16 32x16", _prefill, 32, 8, 128, 16, batch=32, new=16, **FP8),
    _case("prefill fp8 32/8 d64 p16", _prefill, 32, 8, 64, 16, **FP8),
    _case("prefill fp8 32/8 d256 p16", _prefill, 32, 8, 256, 16, **FP8),
    _case("prefill fp8 32/8 d128 p16 mask bits", _prefill, 32, 8, 128, 16, mask=True, **FP8),
    _case("append fp8 8 d128 p16", _append, 8, 128, 16, hot=True, **FP8),
    _case("append fp8 8 d128 p16 token", _append, 8, 128, 16, hot=True, **FP8_TOKEN),
    _case("rope_append fp8 32/8 d128", _rope_append, 32, 8, 128, hot=True, **FP8),
    _case("rope_append fp8 32/8 d128 token", _rope_append, 32, 8, 128, hot=True, **FP8_TOKEN),
    _case("merge_state bf16 d128", _merge_state, 128, hot=True),
    _case("merge_states bf16 d128", _merge_states, 128, hot=True),
    _case("rmsnorm bf16 111", _rmsnorm, 111),
    _case("rmsnorm bf16 3072", _rmsnorm, 3072, hot=True),
    _case("rmsnorm bf16 4096", _rmsnorm, 4096, hot=True),
    _case("rmsnorm bf16 8192", _rmsnorm, 8192, hot=True),
    _case("rmsnorm bf16 16384", _rmsnorm, 16384, hot=True),
    _case("fused_add_rmsnorm bf16 4096", _fused_add_rmsnorm, 4096, hot=True),
    _case("fused_add_rmsnorm fp32 4096", _fused_add_rmsnorm, 4096, jnp.float32),
    _case("fused_add_rmsnorm bf16 5120", _fused_add_rmsnorm, 5120, hot=True),
    _case("fused_add_rmsnorm bf16 8192", _fused_add_rmsnorm, 8192, hot=True),
    _case("fused_add_rmsnorm bf16 16384", _fused_add_rmsnorm, 16384, hot=True),
    _case("fused_add_rmsnorm bf16 20480", _fused_add_rmsnorm, 20480),
    _case("silu_and_mul bf16", _activation, "silu_and_mul", hot=True),
    _case("gelu_and_mul bf16", _activation, "gelu_and_mul", hot=True),
    _case("gelu_tanh_and_mul fp32", _activation, "gelu_tanh_and_mul", jnp.float32, hot=True),
    _case("sampling probs 128256", _sampling, 128256, False, hot=True),
    _case("sampling probs 128256 top_p", _sampling, 128256, False, top_p=None, hot=True),
    _case(
        "sampling probs 151936 top_k top_p",
        _sampling,
        151936,
        False,
        top_k=None,
        top_p=None,
        hot=True,
    ),
    _case(
        "sampling logits bf16 50257 all limits",
        _sampling,
        50257,
        True,
        jnp.bfloat16,
        **ALL_LIMITS,
        hot=True,
    ),
    _case("rope cache neox bf16 32/8 d128", _rope_cache, 32, 8, 128, hot=True),
    _case("rope cache interleaved bf16 32/8 d128", _rope_cache, 32, 8, 128, False),
    _case("rope llama31 pos_ids bf16 32/8 d128", _rope_pos_ids, 32, 8, 128),
    _case("rope cache neox bf16 8/1 d128", _rope_cache, 8, 1, 128),
    _case("rope cache neox bf16 16/8 d256", _rope_cache, 16, 8, 256),
    _case("rope_append bf16 32/8 d128", _rope_append, 32, 8, 128, hot=True),
    _case("rope_append norm bf16 32/8 d128", _rope_append, 32, 8, 128, True, hot=True),
    _case("rope_append apart bf16 32/8 d128", _rope_append, 32, 8, 128, False, True, hot=True),
    _case("rope_append norm bf16 64/8 d128", _rope_append, 64, 8, 128, True),
    _case("rope_append bf16 8/1 d128", _rope_append, 8, 1, 128),
    _case("append bf16 8 d128 p1", _append, 8, 128, 1, hot=True),
    _case("append bf16 8 d128 p16", _append, 8, 128, 16, hot=True),
    # gpt-oss-20b's experts: decode of 32 tokens, a chunk of 512, prefill of 4096; Qwen3-30B-A3B's.
    _case("grouped_matmul bf16 128x2880 e32", _grouped, 32, 4, 32, 5760, 2880, hot=True),
    _case("grouped_matmul bf16 2048x2880 e32", _grouped, 512, 4, 32, 5760, 2880, hot=True),
    _case("grouped_matmul bf16 16384x2880 e32", _grouped, 16384, 1, 32, 2880, 2880, hot=True),
    _case("grouped_matmul bf16 256x768 e128", _grouped, 256, 1, 128, 2048, 768, hot=True),
    _case("grouped_matmul fp32 2048x2880 e32", _grouped, 512, 4, 32, 5760, 2880, jnp.float32),
)


def compile_cases(target: str, cases: Sequence[Case]) -> list[list[KernelReport]]:
    """The kernels of each case.

    By processes: tracing, and even more what Mosaic does before LLVM, is Python. A Mosaic kernel takes ten times as
    long as another, so these are begun first.
    """
    processes = concurrent.futures.ProcessPoolExecutor(
        os.cpu_count(), mp_context=multiprocessing.get_context("spawn")
    )
    with processes as pool:
        results = {
            case.name: pool.submit(_compile_named, target, case.name)
            for case in sorted(cases, key=lambda case: not case.mosaic)
        }
        return [results[case.name].result() for case in cases]


def _compile_named(target: str, name: str) -> list[KernelReport]:
    # The host compiles only; a GPU it may have stays free.
    jax.config.update("jax_platforms", "cpu")
    (case,) = (case for case in CASES if case.name == name)
    try:
        with jax.sharding.set_mesh(_target_mesh(target)):  # plans ask for the device
            fn, args = case.build()
        return compile_for(target, fn, *args, mosaic=case.mosaic)
    except Exception as error:
        error.add_note(f"while compiling {name!r} for {target}")
        raise


COLUMNS: dict[str, Callable[[KernelReport], Any]] = {
    "kernel": lambda k: k.name.removeprefix(KERNEL_PREFIX),
    "threads": lambda k: k.threads,
    "regs": lambda k: k.registers,
    "spill st/ld": lambda k: f"{k.spill_stores}/{k.spill_loads}",
    "local": lambda k: k.local_memory,
    "smem st+dyn": lambda k: f"{k.static_shared}+{k.dynamic_shared}",
    "wgmma": lambda k: k.wgmma,
    "mma.sync": lambda k: k.mma_sync,
    "cp.async": lambda k: k.cp_async,
    "warnings": lambda k: " ".join(re.findall(r"C\d{4}", " ".join(k.warnings))),
}


def format_table(rows: Iterable[tuple[Case, KernelReport]]) -> str:
    """One line a kernel; a star marks a hot case."""
    lines = [["case", *COLUMNS]]
    for case, kernel in rows:
        name = case.name + " *" * case.hot
        lines.append([name, *(str(column(kernel)) for column in COLUMNS.values())])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join(line.rstrip() for line in text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=sorted(ARCHITECTURES), default="h200")
    parser.add_argument("--only", metavar="SUBSTR", default="", help="cases whose name contains it")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every field there too")
    parser.add_argument("--check", action="store_true", help="hot cases only; exit 1 on a fault")
    options = parser.parse_args(argv)

    named = [c for c in CASES if options.only in c.name and options.target in c.targets]
    cases = [c for c in named if c.hot or not options.check]
    if not cases:
        parser.error(f"no case matches --only {options.only!r}")

    results = list(zip(cases, compile_cases(options.target, cases), strict=True))
    rows = [(case, kernel) for case, kernels in results for kernel in kernels]

    print(f"JAX {jax.__version__}, target {options.target}; * marks a hot case")
    print(format_table(rows))
    if options.json:
        fields = [{"case": c.name, "hot": c.hot} | dataclasses.asdict(k) for c, k in rows]
        options.json.write_text(json.dumps(fields, indent=1) + "\n")

    faults = [f"{c.name}, {k.name}: {fault}" for c, k in rows for fault in c.faults(k)]
    faults += [
        f"{c.name}: no kernel of this library in it" for c, kernels in results if not kernels
    ]
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    return 1 if options.check and faults else 0


if __name__ == "__main__":
    sys.exit(main())
