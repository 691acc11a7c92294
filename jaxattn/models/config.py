"""A decoder as a value: sizes, what all layers do, and what each of them does by itself."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from jaxattn.checks import check_heads, check_positive
from jaxattn.models.families import read_fields
from jaxattn.models.layer_spec import LayerSpec
from jaxattn.models.rope_scaling import RopeConfig


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of a decoder; hashable, so static under jit.

    Attributes:
      layers: what each layer does; as many as there are.
      fused_qkv: whether a checkpoint holds q_proj, k_proj and v_proj as one.
      qk_norm: RMSNorm of each query and key head.
      sinks: each layer's attention has a further logit a query head, without a value.
      norm_after: RMSNorm also of what attention and the feed-forward give, before it is added (Gemma's sandwich).
      unit_offset: the checkpoint's norm weights are less 1, as Gemma's; those that are loaded are not.
      sm_scale: softmax scale; None: 1 / sqrt(head_dim).
      attention_soft_cap: attention's logits become `cap * tanh(x / cap)`; None: they stay.
      logits_soft_cap: so do the vocabulary's.
      embedding_scale: what embeddings are multiplied by, rounded to the weights' dtype; None: nothing.

    Raises:
      ValueError: head counts or a rotary_dim that do not fit; no layer, or a window that is not positive.
    """

    vocab_size: int
    hidden_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    layers: tuple[LayerSpec, ...]
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    fused_qkv: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False
    norm_after: bool = False
    unit_offset: bool = False
    sm_scale: float | None = None
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None
    embedding_scale: float | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_heads(self.num_qo_heads, self.num_kv_heads)
        check_positive(num_layers=self.num_layers)
        for rope in self.ropes:
            rope.check(self.head_dim)
        for window in self.windows:
            check_positive(window=1 if window is None else window)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The windows of its layers, each once, the widest first. Layers of one share a page table and a plan."""
        distinct = {layer.window for layer in self.layers}
        return tuple(sorted(distinct, key=lambda w: (w is not None, -(w or 0))))

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The rotary embeddings of its layers, each once, in the order of the layers."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers))

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], tensors: Collection[str] = ()) -> "DecoderConfig":
        """The config that a Hugging Face `config.json` describes.

        Args:
          raw: the JSON object.
          tensors: names of the checkpoint's tensors. A bias that the entries neither ask for nor rule out is there
            if its tensors are.

        Raises:
          ValueError: an unknown architecture; an entry that is missing, of another type, or at odds with another.
          NotImplementedError: entries that are not understood; the message names them.
        """
        return cls(**read_fields(raw, tensors))
