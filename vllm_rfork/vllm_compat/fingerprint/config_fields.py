"""Configuration fields that shape weights.

``BOTH_LAYOUTS`` shape the structure or what loading puts into it. ``RUNTIME_ONLY`` choose kernels, and so what
post-processing makes of the weights; in the checkpoint layout the receiver post-processes for itself. A field that a
version of vLLM does not have is skipped.

Every other field of these sections is in ``ignored.json``, with the reason; a test compares both with the installed
vLLM, so that a person decides about each new field.
"""

from __future__ import annotations

#: Section → its path in a VllmConfig; "model" is the configuration of the model to load, a draft's or the target's.
SECTIONS: dict[str, str] = {
    "model": "model",
    "multimodal": "model.multimodal_config",
    "parallel": "parallel_config",
    "eplb": "parallel_config.eplb_config",
    "cache": "cache_config",
    "load": "load_config",
    "device": "device_config",
    "kv_transfer": "kv_transfer_config",
    "scheduler": "scheduler_config",
    "speculative": "speculative_config",
}

#: Sections that count with all their fields.
WHOLE_SECTION_BOTH_LAYOUTS = {"offload": "offload_config", "engram": "engram_config"}
WHOLE_SECTION_RUNTIME_ONLY = {"attention": "attention_config", "kernel": "kernel_config", "mamba": "mamba_config"}

#: The exceptions: section → reason → fields. Workers with graphs differ from eager ones in these.
WHOLE_SECTION_IGNORED: dict[str, dict[str, tuple[str, ...]]] = {
    "kernel": {
        "compiles and tunes kernels that are already chosen": (
            "enable_flashinfer_autotune",
            "enable_cutedsl_warmup",
            "enable_jit_warmup",
            "enable_rocm_segmented_attn_autotune",
        ),
        "which of several implementations of norms and activations runs; they take the same weights": (
            "ir_op_priority",
        ),
    },
}

BOTH_LAYOUTS: dict[str, tuple[str, ...]] = {
    "model": (
        "dtype",
        "revision",
        "code_revision",
        "quantization",
        "quantization_config",
        # It decides between two tables of LongRoPE.
        "max_model_len",
        # The model's class, and which parts of it are built.
        "model_impl",
        "model_class_overrides",
        "is_submodel_config",
    ),
    "multimodal": (
        "language_model_only",
        "limit_per_prompt",
        "mm_encoder_only",
        "mm_encoder_tp_mode",
        "mm_encoder_fp8_scale_path",
    ),
    "parallel": (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        # The seed key does not contain it. Independent replicas all have 0.
        "data_parallel_rank",
        "prefill_context_parallel_size",
        "decode_context_parallel_size",
        "enable_expert_parallel",
        "expert_placement_strategy",
        "enable_eplb",
        "enable_ep_weight_filter",
        "dcp_q_replicate",
        "enable_hc_sp",
    ),
    "eplb": ("num_redundant_experts", "policy"),
    "cache": (
        "cache_dtype",
        "kv_cache_dtype_skip_layers",
        "calculate_kv_scales",
        # Before vLLM had offload_config.
        "cpu_offload_gb",
        "cpu_offload_params",
    ),
    "speculative": (
        "method",
        "quantization",
        "draft_lm_head_quantization",
        "draft_tensor_parallel_size",
        "parallel_drafting",
    ),
}

RUNTIME_ONLY: dict[str, tuple[str, ...]] = {
    "model": ("override_attention_dtype",),
    "multimodal": ("mm_encoder_attn_backend", "mm_encoder_attn_dtype"),
    "parallel": ("all2all_backend", "enable_dbo", "dcp_comm_backend"),
    # It decides whether SFA on Ascend keeps or drops projections.
    "kv_transfer": ("kv_role",),
    # Post-processing sizes kernels of experts and of packed embeddings for this number of tokens, and a receiver gets
    # the seed's sizes: with larger batches it would overrun them. On Ascend they also decide whether MLA's projections
    # are packed into one (enable_mlapo).
    "scheduler": ("max_num_batched_tokens", "max_num_scheduled_tokens"),
    "speculative": ("moe_backend", "attention_backend", "kv_cache_dtype"),
}

#: ``additional_config`` belongs to the platform's plugin. All its keys count, unknown ones too, except these.
ADDITIONAL_IGNORED = {
    "where logs and dumps go": ("ascend_log_path", "dump_config", "dump_config_path"),
    "parses the configuration again": ("refresh",),
    "binds threads": ("enable_cpu_binding", "cpu_binding"),
}
