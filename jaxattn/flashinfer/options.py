"""What becomes of each option of FlashInfer's here, said once.

`OPTIONS` has a line for every parameter of FlashInfer's that this package takes and does not use. `@flashinfer_options`
looks up the parameters of a function in it: each call refuses options that ask for something, and the docstring gains
the list of them. To build an option, delete its line and use the parameter in the functions that take it; where only
some functions do, the others keep it as an argument of their decorator.
"""

import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import numpy as np

P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Unbuilt:
    """An option that must be off.

    Attributes:
      off: the values that ask for nothing.
      advice: what to do instead.
    """

    off: tuple[Any, ...] = (None,)
    advice: str | None = None

    def check(self, name: str, value: Any) -> None:
        plain = isinstance(value, bool | int | float | str | np.generic)
        if any(value is off or plain and value == off for off in self.off):
            return
        shown = repr(value) if plain else type(value).__name__
        raise NotImplementedError(
            f"{name}={shown} is not built yet: {self.advice or f'leave {name} at its default'}"
        )

    def describe(self, name: str) -> str:
        off = [repr(value) for value in self.off if value is not None]
        return f"{name} ({' or '.join(off)})" if off else name


@dataclasses.dataclass(frozen=True)
class Unwritable:
    """A buffer that FlashInfer would write its result to."""

    advice: str = (
        "use what is returned, and to reuse memory donate buffers to the jit-compiled function "
        "around it"
    )

    def check(self, name: str, value: Any) -> None:
        if value is not None:
            raise NotImplementedError(
                f"{name} cannot be written, as JAX arrays are immutable: {self.advice}"
            )


@dataclasses.dataclass(frozen=True)
class Meaningless:
    """An option that is accepted, whatever its value, as nothing here depends on it."""

    why: str

    def check(self, name: str, value: Any) -> None:
        pass


Option = Unbuilt | Unwritable | Meaningless

_SWITCH = Unbuilt(off=(None, False))
_WORKSPACE = Meaningless("XLA allocates scratch memory")
_RESTATED = Meaningless("the index arrays say it")
_ON_THE_FLY = Meaningless("only with pos_encoding_mode='ROPE_LLAMA'")

OPTIONS: dict[str, Option] = {
    # Which keys a query sees; rotary embeddings inside of attention.
    "variant_owns_mask": _SWITCH,
    "prefix_len_ptr": Unbuilt(),
    "token_pos_in_items_ptr": Unbuilt(),
    "token_pos_in_items_len": Unbuilt(off=(None, 0)),
    "max_item_len_ptr": Unbuilt(),
    "rope_scale": _ON_THE_FLY,
    "rope_theta": _ON_THE_FLY,
    # Shapes and arrangements.
    "v_indptr": Unbuilt(),
    "o_indptr": Unbuilt(),
    "lse_layout": Unbuilt(off=(None, "NH"), advice="transpose the lse that is returned"),
    # Dtypes and scales other than q_scale, k_scale and v_scale.
    "scale_q": Unbuilt(),
    "scale_k": Unbuilt(),
    "scale_v": Unbuilt(),
    "o_scale": Unbuilt(off=(None, 1)),
    "kv_cache_sf": Unbuilt(),
    # How it is computed.
    "backend": Unbuilt(
        off=("auto", "fa2"),
        advice="one FlashAttention-2 kernel serves all cases; use 'auto' or 'fa2'",
    ),
    "use_fp16_qk_reduction": _SWITCH,
    "use_fp16_softmax": _SWITCH,
    "uses_spcompress": _SWITCH,
    "skip_softmax_threshold_scale_factor": Unbuilt(),
    "jit_args": Unbuilt(),
    "jit_kwargs": Unbuilt(),
    "enable_pdl": Meaningless("XLA orders the kernels"),
    "use_tensor_cores": Meaningless("they are always used"),
    "variant": Meaningless("one kernel takes any strides"),
    "non_blocking": Meaningless("nothing blocks"),
    "deterministic": Meaningless("nothing depends on an order of additions"),
    "is_deterministic": Meaningless("nothing depends on an order of additions"),
    # Memory.
    "out": Unwritable(),
    "lse": Unwritable(),
    "float_workspace_buffer": _WORKSPACE,
    "workspace_buffer": _WORKSPACE,
    "int_workspace_buffer": _WORKSPACE,
    "int_workspace_buffers": _WORKSPACE,
    # Hints for FlashInfer's planner.
    "seq_lens": _RESTATED,
    "seq_lens_q": _RESTATED,
    "block_tables": _RESTATED,
    "max_token_per_sequence": _RESTATED,
    "max_sequence_kv": _RESTATED,
    "uniform_q_len": _RESTATED,
}


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """The options that a function marked by `@flashinfer_options` takes and does not use."""
    return getattr(function, "_options", {})


def flashinfer_options(**own: Option | None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Refuses, on every call, what `OPTIONS` says must be off, and adds to the docstring.

    Args:
      own: what becomes of an option in this function, where that is not what `OPTIONS` says; None
        for a parameter that the function uses.
    """

    def mark(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters.values()
        by_position = [x.name for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD]
        takes_more = any(x.kind is x.VAR_POSITIONAL for x in parameters)
        options = {}
        for name in (x.name for x in parameters):
            option = own.get(name, OPTIONS.get(name))
            if option is not None:
                options[name] = option

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            if takes_more and len(args) > len(by_position):
                raise NotImplementedError(
                    "positional arguments after the keys are for custom kernels, which are not "
                    f"built; got {len(args) - len(by_position)}"
                )
            arguments = dict(zip(by_position, args, strict=False)) | kwargs
            for name, option in options.items():
                if name in arguments:
                    option.check(name, arguments[name])
            return function(*args, **kwargs)

        checked._options = options  # type: ignore[attr-defined]
        checked.__doc__ = _documented(function.__doc__, options)
        return checked

    return mark


def _documented(doc: str | None, options: Mapping[str, Option]) -> str:
    """A docstring, and what it leaves to `OPTIONS` to say."""
    unbuilt = [x.describe(name) for name, x in options.items() if isinstance(x, Unbuilt)]
    unwritable = [name for name, x in options.items() if isinstance(x, Unwritable)]
    reasons: dict[str, list[str]] = {}
    for name, x in options.items():
        if isinstance(x, Meaningless):
            reasons.setdefault(x.why, []).append(name)
    ignored = [f"{', '.join(names)} ({why})" for why, names in reasons.items()]
    paragraphs = [inspect.cleandoc(doc or "")]
    for title, listed in (
        ("Not built, NotImplementedError unless left out (or as in brackets)", ", ".join(unbuilt)),
        ("Not writable, NotImplementedError unless left out", ", ".join(unwritable)),
        ("Without a meaning here, accepted and ignored", "; ".join(ignored)),
    ):
        if listed:
            paragraphs.append(textwrap.fill(f"{title}: {listed}.", 100))
    return "\n\n".join(filter(None, paragraphs))
