"""Which layers of a decoder see a window only: `layer_types` says it, or the older entries of each family.

A family's function takes the entries and the number of layers.
"""

from collections.abc import Callable

from jaxattn.models.entries import BOOL, COUNT, POSITIVE_INT, TEXTS, Entries

FULL, SLIDING = "full_attention", "sliding_attention"

LayerTypes = Callable[[Entries, int], list[str]]


def read_layer_types(
    entries: Entries, num_layers: int, older: LayerTypes
) -> tuple[list[str], int | None]:
    """(the kind of attention of each layer, the window of the sliding ones: keys that a token sees, its own included).

    Transformers' masks have a query at i see the keys j with `i - sliding_window < j <= i`, in every family.

    Raises:
      ValueError: the entries do not settle which layers slide, or how far they see.
      NotImplementedError: another kind of attention.
    """
    window = entries.get("sliding_window", POSITIVE_INT)
    earlier = entries.get("sliding_window_size", POSITIVE_INT, window)
    if earlier != window:
        raise ValueError(
            "sliding_window and the older sliding_window_size in config.json must be the same; got "
            f"{window} and {earlier}"
        )
    kinds = entries.get("layer_types", TEXTS)
    if kinds is None:
        kinds = older(entries, num_layers)
    else:
        _check_given(entries, kinds, num_layers)
    if SLIDING in kinds and window is None:
        raise ValueError(
            f"config.json has no 'sliding_window', which its {kinds.count(SLIDING)} sliding layers "
            "need"
        )
    return list(kinds), window


def _check_given(entries: Entries, kinds: list[str], num_layers: int) -> None:
    if len(kinds) != num_layers:
        raise ValueError(
            f"layer_types in config.json must have {num_layers} items, num_hidden_layers; got "
            f"{len(kinds)}"
        )
    unknown = sorted(set(kinds) - {FULL, SLIDING})
    if unknown:
        raise NotImplementedError(
            f"layer_types {', '.join(map(repr, unknown))} are not built; supported: {FULL!r}, "
            f"{SLIDING!r}"
        )
    # What older entries say, layer_types says better; they must not contradict it outright.
    entries.get("max_window_layers", COUNT)
    if entries.get("use_sliding_window", BOOL) is False and SLIDING in kinds:
        raise ValueError(
            "use_sliding_window=false and layer_types in config.json contradict each other: "
            f"{kinds.count(SLIDING)} layers are {SLIDING!r}"
        )
    pattern = entries.get("sliding_window_pattern", POSITIVE_INT)
    if pattern is not None and kinds != every_nth_is_full(pattern, num_layers):
        raise ValueError(
            f"sliding_window_pattern={pattern} and layer_types in config.json contradict each other: take the former "
            "out, or change layer_types"
        )
    entries.get(
        "_sliding_window_pattern", POSITIVE_INT
    )  # transformers writes it, whatever the layers are


def llama(entries: Entries, num_layers: int) -> list[str]:
    window = entries.get("sliding_window", POSITIVE_INT)
    use = entries.get("use_sliding_window", BOOL)
    entries.get("max_window_layers", COUNT)
    if use or (use is None and window is not None):
        raise ValueError(
            f"sliding_window={window} in the config.json of a Llama does not say which layers "
            "slide: add layer_types, or say use_sliding_window=false"
        )
    return [FULL] * num_layers


def mistral(entries: Entries, num_layers: int) -> list[str]:
    window = entries.get("sliding_window", POSITIVE_INT)
    use = entries.get("use_sliding_window", BOOL)
    first = entries.get("max_window_layers", COUNT)
    if window is not None and (use is False or first):
        raise ValueError(
            "the sliding_window of a Mistral is that of every layer, which "
            f"use_sliding_window={use} and max_window_layers={first} in config.json contradict: "
            "say which layers slide by layer_types"
        )
    return [SLIDING if window or use else FULL] * num_layers


def qwen(entries: Entries, num_layers: int) -> list[str]:
    """The first max_window_layers are full."""
    first = entries.get("max_window_layers", COUNT)
    if not entries.get("use_sliding_window", BOOL):
        return [FULL] * num_layers
    if first is None:
        first = entries.need("max_window_layers", COUNT)
    return [FULL if i < first else SLIDING for i in range(num_layers)]


def all_slide(entries: Entries, num_layers: int) -> list[str]:
    """All do, if there is a window."""
    window = entries.get("sliding_window", POSITIVE_INT)
    return [SLIDING if window else FULL] * num_layers


def qwen_moe(entries: Entries, num_layers: int) -> list[str]:
    """max_window_layers, which real files have, says nothing here."""
    entries.get("max_window_layers", COUNT)
    if not entries.get("use_sliding_window", BOOL):
        return [FULL] * num_layers
    return all_slide(entries, num_layers)


def every_second(entries: Entries, num_layers: int) -> list[str]:
    """The first slides."""
    return every_nth_is_full(2, num_layers)


def gemma3(entries: Entries, num_layers: int) -> list[str]:
    written = entries.get("_sliding_window_pattern", POSITIVE_INT, 6)
    return every_nth_is_full(
        entries.get("sliding_window_pattern", POSITIVE_INT, written), num_layers
    )


def every_nth_is_full(n: int, num_layers: int) -> list[str]:
    return [SLIDING if (i + 1) % n else FULL for i in range(num_layers)]
