"""The names of `jaxattn.models.decoder` and its neighbours as they were when it served Llama-like models alone."""

from jaxattn.models.config import DecoderConfig
from jaxattn.models.decoder import Batch as Batch
from jaxattn.models.decoder import Caches as Caches
from jaxattn.models.decoder import check_context as check_context
from jaxattn.models.decoder import decode_step as decode_step
from jaxattn.models.decoder import empty_caches as empty_caches
from jaxattn.models.decoder import forward as forward
from jaxattn.models.decoder import make_batch as make_batch
from jaxattn.models.decoder import prefill as prefill
from jaxattn.models.decoder import rope_tables
from jaxattn.models.layer_spec import LayerSpec as LayerSpec
from jaxattn.models.linear import Linear as Linear
from jaxattn.models.linear import Source as Source
from jaxattn.models.rope_scaling import RopeConfig as RopeConfig
from jaxattn.models.weights import Layer as Layer
from jaxattn.models.weights import Params as Params
from jaxattn.models.weights import load as load
from jaxattn.models.weights import read_config as read_config
from jaxattn.models.weights import sources as sources

LlamaConfig = DecoderConfig
rope_table = rope_tables
