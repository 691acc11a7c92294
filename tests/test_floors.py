"""The house has floors: a file of jaxattn/ imports only from lower ones."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxattn

PACKAGE = Path(jaxattn.__file__).parent

FLOORS = [
    [
        "as_program",
        "checks",
        "device",
        "kernels._float16",
        "kernels.triton._launch",
        "kernels.triton._rows",
        "padded",
        "token_mass",
    ],
    ["kernels.triton.one_program"],
    ["kv_scales", "spec"],
    ["kv_cache", "page_table"],
    ["dispatch", "operands", "work_list"],
    ["visits"],
    ["plan"],
    ["decode_plan", "prefill_plan"],
    ["reference", "reference_sampling"],
    ["kernels.triton._online_softmax", "kernels.triton._float16"],
    [
        "kernels.triton._keys",
        "kernels.triton._limits",
        "kernels.triton._token_rows",
        "kernels.triton.tiles",
    ],
    [
        "kernels.triton._gathered",
        "kernels.triton._heads",
        "kernels.triton._page_slots",
        "kernels.triton._scales_in_line",
        "kernels.triton.keys_in_line",
        "kernels.triton.merge",
    ],
    ["kernels.triton._merge_apart", "kernels.triton._split_merge"],
    ["kernels.mosaic._private", "kernels.mosaic._warpgroup"],
    [
        "kernels.mosaic._converting",
        "kernels.mosaic._elements",
        "kernels.mosaic._in_line",
        "kernels.mosaic._keys",
        "kernels.mosaic._launch",
    ],
    ["kernels.mosaic._online_softmax", "kernels.mosaic._products", "kernels.mosaic.tiles"],
    ["kernels.mosaic._queries"],
    ["kernels.mosaic._units"],
    [
        "kernels.mosaic._loading",
        "kernels.mosaic._rows",
        "kernels.mosaic._splits",
        "kernels.mosaic.serves",
    ],
    ["kernels.mosaic._token_scales"],
    ["kernels.mosaic._computing"],
    ["kernels.mosaic._feeding"],
    ["kernels.*"],
    ["activation", "append", "attention", "grouped_matmul", "merge", "norm", "rope", "sampling"],
    ["dense", "model_step", "ragged"],
    ["flashinfer.arguments", "flashinfer.index_arrays", "flashinfer.options"],
    ["flashinfer.logits", "flashinfer.masks"],
    [
        "flashinfer.activation",
        "flashinfer.cascade",
        "flashinfer.norm",
        "flashinfer.page",
        "flashinfer.quantization",
        "flashinfer.sampling",
    ],
    ["flashinfer.programs"],
    ["flashinfer.batch_wrapper"],
    ["flashinfer.decode", "flashinfer.paged_prefill", "flashinfer.ragged_prefill"],
    [
        "flashinfer.attention_sink",
        "flashinfer.bidirectional_ranges",
        "flashinfer.cuda_graph_decode",
    ],
    ["flashinfer.multi_level_cascade", "flashinfer.single"],
    ["flashinfer.__init__"],
    ["models.checkpoint", "models.entries", "models.known_entries", "models.linear"],
    ["models.mxfp4", "models.stretched_rope"],
    ["models.feed_forward", "models.layer_types", "models.multimodal", "models.rope_scaling"],
    ["models.layer_spec", "models.moe"],
    ["models.rope_entries", "models.stored_experts"],
    ["models.feed_forward_entries"],
    ["models.families"],
    ["models.config"],
    ["models.weights"],
    ["models.decoder"],
    ["models.*"],
    ["page_rings"],
    ["steps"],
    ["call"],
    ["outputs"],
    ["generator"],
    ["__init__", "generate"],
]

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """`jaxattn/kernels/decode.py` -> `kernels.decode`; a folder's `__init__` keeps that name."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def floor_of(name: str) -> int | None:
    for floor, patterns in enumerate(FLOORS):
        for pattern in patterns:
            if name == pattern or pattern.endswith("*") and name.startswith(pattern[:-1]):
                return floor
    return None


def imported(path: Path) -> Iterator[str]:
    """Every dotted name a file imports, made absolute; `from a import b` gives `a.b`."""
    package = ["jaxattn", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imported_files(path: Path) -> Iterator[str]:
    """The files of jaxattn/ that a file imports, named as `name_of` names them."""
    for dotted in imported(path):
        first, *rest = dotted.split(".")
        if first != "jaxattn":
            continue
        # The longest prefix that is a file; what follows it is a name inside that file.
        while rest and not (PACKAGE / "/".join(rest)).with_suffix(".py").exists():
            if (PACKAGE / "/".join(rest) / "__init__.py").exists():
                break
            rest = rest[:-1]
        is_file = rest and (PACKAGE / "/".join(rest)).with_suffix(".py").exists()
        yield ".".join(rest if is_file else [*rest, "__init__"])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_only_from_lower_floors(path):
    name = name_of(path)
    floor = floor_of(name)
    assert floor is not None, f"{name} has no floor: add it to FLOORS"
    for other in imported_files(path):
        other_floor = floor_of(other)
        assert other_floor is not None, f"{other} has no floor: add it to FLOORS"
        assert other_floor < floor, f"{name} (floor {floor}) imports {other} (floor {other_floor})"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_kernels_import_pallas(path):
    if not name_of(path).startswith("kernels."):
        pallas = [dotted for dotted in imported(path) if "pallas" in dotted]
        assert not pallas, f"{name_of(path)} imports {pallas}; only kernels/ may"
