"""Checkpoints in Hugging Face's format: a folder with `config.json` and safetensors files.

The tensors lie in `model.safetensors`, or in shards that `model.safetensors.index.json` lists.
"""

import json
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from jaxattn.checks import FLOAT_DTYPES

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_NAMES = dict(  # NumPy's, of safetensors' dtypes; it has none for others, such as F8_E4M3
    F64="float64", F32="float32", F16="float16", BF16="bfloat16", I64="int64", I32="int32",
    I16="int16", I8="int8", U64="uint64", U32="uint32", U16="uint16", U8="uint8", BOOL="bool",
)  # fmt: skip


def read_json(folder: str | Path, name: str) -> dict[str, Any]:
    """One of a checkpoint's JSON files.

    Raises:
      FileNotFoundError: there is no such folder or file.
      ValueError: the file holds no JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"a model must be a local folder with config.json; there is no folder {str(folder)!r}"
        )
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"{name} is missing in {str(folder)!r}")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object; got {type(content).__name__}")
    return content


class Checkpoint:
    """A checkpoint's tensors by name, read from the files one at a time.

    Args:
      folder: where it lies.
      rename: from a tensor's name in the files to its name here, or None to leave it out; default: names stay.

    Attributes:
      names: of all tensors, those included that a shard holds and the index does not list.

    Raises:
      FileNotFoundError: no weights in the folder, or a shard is missing.
      ImportError: safetensors is not installed.
      ValueError: a file is not in the safetensors format.
    """

    def __init__(self, folder: str | Path, rename: Callable[[str], str | None] | None = None):
        self.folder = Path(folder)
        if (self.folder / INDEX).exists():
            index = read_json(folder, INDEX).get("weight_map")
            if not isinstance(index, dict):
                raise ValueError(f"{INDEX} in {str(folder)!r} has no 'weight_map'")
            self._file_of = {name: self.folder / file for name, file in index.items()}
            for path in sorted(set(self._file_of.values())):
                if not path.exists():
                    raise FileNotFoundError(
                        f"{path.name}, which {INDEX} lists, is missing in {str(folder)!r}"
                    )
                with _open(path) as tensors:
                    self._file_of = dict.fromkeys(tensors.keys(), path) | self._file_of
        elif (self.folder / WEIGHTS).exists():
            path = self.folder / WEIGHTS
            with _open(path) as tensors:
                self._file_of = {name: path for name in tensors.keys()}
        else:
            raise FileNotFoundError(
                f"neither {WEIGHTS} nor {INDEX} is in {str(folder)!r}: only safetensors are read"
            )
        renamed = {name: rename(name) if rename else name for name in self._file_of}
        self._stored = {new: name for name, new in renamed.items() if new is not None}
        self._last: tuple[Path, Any, Set[str]] | None = None

    @property
    def names(self) -> Set[str]:
        return self._stored.keys()

    def read(
        self, name: str, shape: tuple[int, ...], dtypes: Sequence[str] = FLOAT_DTYPES
    ) -> np.ndarray:
        """The tensor `name`, one of `names`, of this shape and one of these dtypes.

        Raises:
          ValueError: the file does not hold it, or with another shape.
          TypeError: a tensor of another dtype.
        """
        name = self._stored[name]
        tensors, held = self._tensors(self._file_of[name])
        if name not in held:
            file = self._file_of[name].name
            raise ValueError(f"{INDEX} places {name!r} in {file}, which does not hold it")
        unread = tensors.get_slice(name)
        came = tuple(unread.get_shape())
        if came != shape:
            raise ValueError(
                f"tensor {name!r} must have shape {list(shape)} (config.json); got {list(came)}"
            )
        dtype = unread.get_dtype()
        dtype = _NAMES.get(dtype, dtype)
        if dtype not in dtypes:
            raise TypeError(f"tensor {name!r} must be one of {', '.join(dtypes)}; got {dtype}")
        return tensors.get_tensor(name)

    def _tensors(self, path: Path) -> tuple[Any, Set[str]]:
        """An open file and the names of its tensors. The last one stays open: what is read next is mostly in it, and
        opening takes milliseconds, once for each projection of each of some thousand experts."""
        if self._last is None or self._last[0] != path:
            tensors = _open(path)
            self._last = path, tensors, frozenset(tensors.keys())
        return self._last[1:]


def _open(path: Path) -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "reading a checkpoint needs safetensors: pip install 'jaxattn[models]'"
        ) from error
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a complete safetensors file: {error}") from error
