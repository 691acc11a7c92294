"""The text model inside one that takes images too: Gemma 3's.

What such a model makes of text alone is what its text model makes of it. Its vision tower, and what joins it to the
text, are left out by name: nothing here takes an image.
"""

from collections.abc import Mapping
from typing import Any

from jaxattn.models.entries import BOOL, OBJECT, TEXT, TEXTS, TOKEN_IDS, Entries
from jaxattn.models.known_entries import HARMLESS, NEUTRAL

MODEL_TYPE, ARCHITECTURE = "gemma3", "Gemma3ForConditionalGeneration"
TEXT_MODEL = dict(model_type="gemma3_text", architectures=["Gemma3ForCausalLM"])

# Of images: how many tokens one takes, and which tokens stand around it.
_IMAGES = HARMLESS | {
    "vision_config",
    "mm_tokens_per_image",
    "boi_token_index",
    "eoi_token_index",
    "image_token_index",
}
_IMAGE_TENSORS = tuple(
    prefix + name
    for prefix in ("", "model.")
    for name in ("vision_tower.", "multi_modal_projector.")
)
_TEXT_TENSORS = {  # by how a name begins, the beginning in the text model's own checkpoints
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}


def takes_images(raw: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of a model with images."""
    return raw.get("model_type") == MODEL_TYPE or raw.get("architectures") == [ARCHITECTURE]


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of the text model alone.

    Raises:
      ValueError: no text_config; one that is another model's, or at odds with the entries beside it.
      NotImplementedError: entries that are not understood.
    """
    outer = Entries(raw, "config.json")
    text = dict(outer.need("text_config", OBJECT))
    named = outer.get("model_type", TEXT, MODEL_TYPE), outer.get("architectures", TEXTS)
    inner = text.get("model_type", TEXT_MODEL["model_type"])
    if named not in ((MODEL_TYPE, [ARCHITECTURE]), (MODEL_TYPE, None)) or (
        inner != TEXT_MODEL["model_type"]
    ):
        raise ValueError(
            f"a {ARCHITECTURE} has model_type {MODEL_TYPE!r} and a text_config of model_type "
            f"{TEXT_MODEL['model_type']!r}; got {named[1]}, {named[0]!r} and {inner!r}"
        )
    tied = outer.get("tie_word_embeddings", BOOL)
    if tied is not None and text.setdefault("tie_word_embeddings", tied) != tied:
        raise ValueError(
            f"tie_word_embeddings={tied} in config.json and {not tied} in its text_config must be the same"
        )
    eos = outer.get("eos_token_id", TOKEN_IDS)
    outer.refuse_the_rest(_IMAGES, NEUTRAL)
    return text | TEXT_MODEL | ({} if eos is None else dict(eos_token_id=eos))


def text_name(name: str) -> str | None:
    """A tensor's name in a checkpoint of the text model alone; None for one of images."""
    if name.startswith(_IMAGE_TENSORS):
        return None
    for begin, own in _TEXT_TENSORS.items():
        if name.startswith(begin):
            return own + name.removeprefix(begin)
    return name
