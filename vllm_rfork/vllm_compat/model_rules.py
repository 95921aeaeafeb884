"""What no seed can vouch for and no receiver needs: memory that serving writes to. Left out by name, with the reason.

Tables, which the walk and ``built`` read. A rule stands here where forward passes of vLLM or vLLM-Ascend write to
the memory, and write it before they read it, so that what a receiver has allocated for itself is as good.
"""

from __future__ import annotations

#: Attributes and their reasons, wherever they are met.
SCRATCH = {
    "kv_cache": "bound to the KV cache after loading",
    "_kv_cache": "bound to the KV cache after loading",
    "workspace": "kernel scratch",
    "workspace_buffer": "kernel scratch",
    "_workspace_buffer": "kernel scratch",
    "_workspace_buf": "kernel scratch of MLA on Blackwell (SM100Workspace)",
    "_nvfp4_fp8_out": "FlashInfer's output before it goes on, written in every step",
    "q_range": "a setting's number, put on whichever device is current whenever weights are loaded or updated",
    "k_range": "a setting's number, put on whichever device is current whenever weights are loaded or updated",
    "v_range": "a setting's number, put on whichever device is current whenever weights are loaded or updated",
    "topk_indices_buffer": "sparse attention writes its indices there in every step",
    "candidate_block_buffer": "sparse attention writes its candidates there in every step",
    "sparse_table_buffers": "sparse attention writes its block tables there in every step",
    "sparse_bt_buffer": "sparse attention writes its block tables there in every step",
    "sparse_ctx_buffer": "sparse attention writes its lengths there in every step",
    "_mtp_hidden_buffer": "hidden states that the target leaves for its draft in every step",
    "_compress_scratch": "kernel scratch",
    "deepstack_input_embeds": "features of images on their way to deeper layers, written per request",
    "_ds_buffers": "features of images on their way to deeper layers, written per request",
    "per_layer_embeddings": "embeddings of the tokens at hand, written in every step",
    "_prefetch_ids": "rows of an n-gram table that the next step will look up",
    "_fp8_q_amax": "a history of what a vision tower has seen",
    "_fp8_k_amax": "a history of what a vision tower has seen",
    "_fp8_v_amax": "a history of what a vision tower has seen",
    "punica_wrapper": "which adapters the tokens at hand ask for, written in every step",
    "expert_load_view": "EPLB statistics",
    "logical_to_physical_map": "EPLB bookkeeping",
    "logical_replica_count": "EPLB bookkeeping",
    "key_cache": "vLLM-Ascend binds the KV cache to attention implementations",
    "value_cache": "vLLM-Ascend binds the KV cache to attention implementations",
    "o_proj_full_pool": "vLLM-Ascend gathers into it in every step",
    "o_proj_full_gather_pool": "vLLM-Ascend gathers into it in every step",
    "moe_load": "vLLM-Ascend's EPLB statistics",
    "load_counter": "vLLM-Ascend's EPLB statistics",
}

#: The same under names that others may give to weights: by a class of the holder's, and the reason.
SCRATCH_OF = {
    (kind, name): reason
    for reason, kinds, names in (
        (
            "inputs of a graph, written in every step (kv_sharing_fast_prefill)",
            ("Gemma3nTextModel", "Gemma4Model"),
            ("positions", "hidden_states", "per_layer_inputs"),
        ),
        (
            "rows of an n-gram table that this step has looked up",
            ("Engram", "EngramBatch"),
            ("staged_rows", "packed_rows", "fp8_values", "fp8_scales"),
        ),
        (
            "made of uninitialized coefficients by construction, and of the loaded ones by the first forward pass",
            ("FourierRotaryEmbedding",),
            ("cos_sin_cache",),
        ),
    )
    for kind in kinds
    for name in names
}

#: The same where the holder says so itself: it has this attribute, and it is True.
SCRATCH_WHEN = {
    ("_fp8_dynamic_scale", name): "a vision tower computes it from what it sees, in every pass before it is used"
    for name in ("_fp8_q_scale", "_fp8_k_scale", "_fp8_v_scale")
}

#: Objects that hold nothing else, by a class of theirs.
SCRATCH_OBJECTS = {
    "DirectCPWorkspace": "what ranks of context parallelism hand to each other",
    "CollectiveKernel": "memory that ranks share while experts' results are summed up",
    "PreTrainedTokenizerBase": "turns text into tokens, and has all of its vocabulary in dicts and lists",
    "TokenizerLike": "turns text into tokens, and has all of its vocabulary in dicts and lists",
    "ProcessorMixin": "turns media into inputs, by a tokenizer of its own",
    "RoutedExpertsSink": "which experts the tokens at hand went to",
}


def is_scratch_object(value: object) -> bool:
    """Whether ``value`` is of a class in :data:`SCRATCH_OBJECTS`, or of one derived from it."""
    return any(kind.__name__ in SCRATCH_OBJECTS for kind in type(value).__mro__)
