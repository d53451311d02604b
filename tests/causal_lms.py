"""Tiny random models of every type of causal LM that transformers knows and that shrinks."""

import transformers

LAYERS, MOST = 4, 5_000_000  # parameters of a model that is still tiny

_SIZES = {
    32: "hidden_size d_model n_embd dim n_embed lru_width embedding_size attention_hidden_size "
    "embedding_dim",
    48: "intermediate_size ffn_dim d_ff n_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim "
    "dff moe_intermediate_size shared_expert_intermediate_size mlp_intermediate_size",
    LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_decoder_layers num_blocks num_attention_heads n_head n_heads num_heads "
    "decoder_attention_heads encoder_attention_heads num_experts num_local_experts "
    "n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads time_step_rank mamba_dt_rank "
    "linear_num_value_heads rotary_dim laurel_rank index_topk chunk_size mamba_chunk_size "
    "n_mamba_heads",
    2: "num_key_value_heads num_experts_per_tok moe_k linear_num_key_heads index_n_heads expand "
    "mamba_expand eos_token_id",
    8: "head_dim d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim attention_chunk_size state_size "
    "mamba_d_state linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input "
    "index_head_dim",
    16: "q_lora_rank kv_lora_rank mamba_d_head mamba_headdim mamba_head_dim",
    128: "max_position_embeddings n_positions n_ctx seq_length max_seq_len context_length "
    "max_sequence_length",
    320: "vocab_size vocab_size_per_layer_input",
    5: "sliding_window window_size attention_window",
    1: "n_group topk_group n_groups mamba_n_groups mamba_ngroups first_k_dense_replace "
    "bos_token_id",
    0: "pad_token_id num_kv_shared_layers",
    64: "mamba_d_ssm",
}
_OWN = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"head_dim": 16},
}


def build(name, seed=1):
    """A model of a type, with weights that make it sure of little.

    Raises:
        Exception: It cannot be made, or not small.
    """
    import torch

    own = dict(_OWN.get(name, {}))
    config = transformers.CONFIG_MAPPING[name]()
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        _shrink(part, own)
    for key, value in own.items():
        setattr(config, key, value)
    with torch.device("meta"):
        whole = transformers.AutoModelForCausalLM.from_config(config)
    count = sum(weight.numel() for weight in whole.parameters())
    if count > MOST:
        raise ValueError(f"{count:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(0.25 * torch.randn(weight.shape, generator=draw))
    return model


def _shrink(config, own):
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    before = len(getattr(config, "layer_types", None) or [])
    for value, names in _SIZES.items():
        for name in names.split():
            if name not in own and type(getattr(config, name, None)) in (int, float):
                _set(config, name, value)
    _set(config, "pad_token_id", 0)
    if hasattr(config, "kv_lora_rank"):  # every head has keys of its own
        _set(config, "num_key_value_heads", LAYERS)
    if kinds and "layer_types" not in own:
        _set(config, "layer_types", [kinds[i % len(kinds)] for i in range(LAYERS)])
    for name, value in list(vars(config).items()):
        if name != "layer_types" and isinstance(value, list) and kinds and len(value) == before:
            _set(config, name, value[:LAYERS])
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        rope["mrope_section"] = [2, 1, 1]


def _set(config, name, value):
    try:
        setattr(config, name, value)
    except Exception:  # derived from others
        pass
