"""Sampling: limits that differ from request to request in one batch, from logits and from a model's `generate`."""

import string

import jax
import jax.numpy as jnp
import numpy as np

import jaxattn as ja
from jaxattn.generate import generate
from jaxattn.models.config import DecoderConfig
from jaxattn.models.weights import sources

# From logits: a token of each row, 400 rows of the same five probabilities, each with a key of its own.
logits = jnp.tile(jnp.log(jnp.asarray([0.4, 0.3, 0.15, 0.1, 0.05])), (400, 1))
keys = jax.random.split(jax.random.key(0), 400)
for limit in ({}, {"top_k": 2}, {"top_p": 0.8}, {"min_p": 0.2}, {"temperature": 0.0}):
    print(f"{limit} draws of", sorted(set(ja.sampling_from_logits(logits, keys, **limit).tolist())))
top_k = jnp.asarray([1, 2, 3, 4] * 100)  # a limit of each row
tokens = ja.sampling_from_logits(logits, keys, top_k=top_k)
print("a top_k of each row:", [int(tokens[top_k == k].max()) + 1 for k in (1, 2, 3, 4)])
moved = ja.sampling_from_logits(logits, keys[::-1], top_k=top_k[::-1])[::-1]
print("a row's token is its key's, wherever the row is:", bool((moved == tokens).all()))

# From a model: a Gemma 3 of random weights that writes letters, described as its config.json would.
config = DecoderConfig.from_hf(
    dict(
        model_type="gemma3_text",
        vocab_size=26,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=8,
        max_position_embeddings=256,
    )
)
rng = np.random.default_rng(0)
params = jax.tree.map(
    lambda weight: jnp.asarray(rng.standard_normal(weight.shape) / 8, jnp.float32), sources(config)
)


def decode(tokens):
    return "".join(string.ascii_lowercase[token] for token in tokens)


prompts = [[7, 4, 11, 11, 14]] * 4
options = dict(
    max_new_tokens=16,
    temperature=[0.0, 1.0, 1.0, 1.0],  # of each request; the first takes the likeliest token
    top_k=[None, 1, 4, None],
    min_p=[0.0, 0.0, 0.0, 0.1],
    logprobs=4,  # of the token taken, and of the 4 likeliest
    seed=1,
    decode=decode,
)
all_of_it = generate(params, config, prompts, **options)
likeliest, of_one, of_four, of_some = all_of_it.texts
print("four equal prompts, texts:", len({likeliest, of_one, of_four, of_some}))
print("a top_k of 1 takes the likeliest token too:", of_one == likeliest)
among = [token in top for token, top in zip(all_of_it.tokens[2], all_of_it.top_logprobs[2])]
print("a top_k of 4 draws among the 4 likeliest:", all(among))
most = [max(top.values()) for top in all_of_it.top_logprobs[3]]
near = [x >= y + np.log(0.1) for x, y in zip(all_of_it.logprobs[3], most)]
print("a min_p of 0.1 draws what has a tenth of the likeliest's probability:", all(near))

stop = likeliest[6:9]
ended = generate(params, config, prompts, **options, stop=[stop, None, None, None])
print("a stop string ends a text:", ended.texts[0] == likeliest[: likeliest.find(stop)])
print("the same seed gives the others' texts again:", ended.texts[1:] == all_of_it.texts[1:])
# prints:
# {} draws of [0, 1, 2, 3, 4]
# {'top_k': 2} draws of [0, 1]
# {'top_p': 0.8} draws of [0, 1, 2]
# {'min_p': 0.2} draws of [0, 1, 2, 3]
# {'temperature': 0.0} draws of [0]
# a top_k of each row: [1, 2, 3, 4]
# a row's token is its key's, wherever the row is: True
# four equal prompts, texts: 3
# a top_k of 1 takes the likeliest token too: True
# a top_k of 4 draws among the 4 likeliest: True
# a min_p of 0.1 draws what has a tenth of the likeliest's probability: True
# a stop string ends a text: True
# the same seed gives the others' texts again: True
