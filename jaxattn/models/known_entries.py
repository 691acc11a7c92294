"""Entries of a Hugging Face `config.json` that no decoder here reads and that may pass nonetheless.

None is ignored. A decoder here computes one thing; an entry that asks for another (experts, a scale) and is not obeyed
gives wrong tokens without a word. Which entries do so nobody can list, for each new model brings its own. So an entry
passes if `families.py` reads it, if it is null, or if it is in `HARMLESS` or at its value in `NEUTRAL`.
"""

# Entries that change no logit of these decoders, whatever they say.
HARMLESS = frozenset(
    # Where the file comes from, and how its weights were stored.
    "_name_or_path name_or_path _commit_hash transformers_version unsloth_fixed unsloth_version "
    "dtype torch_dtype tokenizer_class "
    # How PyTorch runs the model and what it returns. Pretraining's tensor parallelism and chunks of a feed-forward
    # cut the same sums.
    "use_cache use_bfloat16 torchscript return_dict output_attentions output_hidden_states "
    "gradient_checkpointing _attn_implementation _attn_implementation_autoset attn_implementation "
    "_flash_attn_2_enabled pretraining_tp chunk_size_feed_forward tf_legacy_loss is_decoder "
    # Training: first weights, dropout, and what keeps experts busy.
    "initializer_range attention_dropout hidden_dropout embd_pdrop resid_pdrop "
    "router_aux_loss_coef output_router_logits "
    # Tokens that the caller adds, and how tokens are drawn: options of transformers' generate().
    "bos_token_id pad_token_id sep_token_id decoder_start_token_id prefix max_length min_length "
    "max_sequence_length max_new_tokens do_sample early_stopping num_beams num_beam_groups "
    "diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences "
    "output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "cache_implementation "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    # Classification heads, which a decoder that predicts tokens does not have.
    "id2label label2id num_labels problem_type finetuning_task task_specific_params".split()
)

# Entries that change logits, and the value at which they do not.
NEUTRAL = {
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "rope_traditional": False,
    "use_mrope": False,
    "is_causal": True,
    "use_bidirectional_attention": False,
    "use_qk_norm": False,
    "qkv_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "num_experts": 0,
    "shared_expert_intermediate_size": 0,
    "no_rope_layers": [],
    "pruned_heads": {},
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
}
