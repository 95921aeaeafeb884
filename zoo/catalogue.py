"""The models of the zoo, and beforehand what must come of each."""

from __future__ import annotations

from typing import Any

from zoo.roles import EMBED
from zoo.specimen import Specimen

#: Shapes that kernels of every platform take: heads of 32, widths that are multiples of 128.
SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
HEADS_OF_32 = {**SMALL, "head_dim": 32}
#: Without what old architectures call otherwise or do not have.
PLAIN = {key: value for key, value in SMALL.items() if key not in ("num_key_value_heads", "tie_word_embeddings")}

MLA: dict[str, Any] = {
    **SMALL,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
}
DEEPSEEK_V3: dict[str, Any] = {
    **MLA,
    "topk_method": "noaux_tc",
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}

VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 64,
}

#: Places of the marks in ``checkpoints.tokenizer``.
IMAGE, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD, AUDIO = 248, 249, 250, 251, 252, 253

#: Reasons that several models share; each is a part of what vLLM says.
NOT_INSPECTED = {"without-torchvision": "failed to be inspected"}
READS_HEADERS = "vLLM asks the headers of the weight files which layers are quantized"

CATALOGUE: list[Specimen] = [
    Specimen("llama", "grouped heads, untied head", "LlamaForCausalLM", SMALL),
    Specimen("qwen2-tied", "biases, tied embeddings", "Qwen2ForCausalLM", {**SMALL, "tie_word_embeddings": True}),
    Specimen("qwen3", "norms on queries and keys", "Qwen3ForCausalLM", HEADS_OF_32),
    Specimen(
        "gemma3",
        "two rotary bases, interleaved windows, tied",
        "Gemma3ForCausalLM",
        {
            **HEADS_OF_32,
            "tie_word_embeddings": True,
            "sliding_window": 16,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    Specimen(
        "phi",
        "partial rotary, biases everywhere",
        "PhiForCausalLM",
        {**SMALL, "num_key_value_heads": 4},
        refused={"any": "lm_head.bias: only the seed has it"},
    ),
    Specimen("phi3", "weights fused in the checkpoint", "Phi3ForCausalLM", SMALL),
    Specimen(
        "opt",
        "old style: learned positions, ReLU",
        "OPTForCausalLM",
        {
            "vocab_size": 256,
            "hidden_size": 128,
            "ffn_dim": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 128,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    Specimen(
        "gpt2",
        "old style: transposed weights, tied",
        "GPT2LMHeadModel",
        {
            "vocab_size": 256,
            "n_embd": 128,
            "n_head": 4,
            "n_layer": 2,
            "n_positions": 128,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    Specimen("mistral-window", "sliding window", "MistralForCausalLM", {**HEADS_OF_32, "sliding_window": 16}),
    Specimen("mixtral", "experts", "MixtralForCausalLM", {**SMALL, "num_local_experts": 4}),
    Specimen(
        "qwen3-moe",
        "experts, small ones",
        "Qwen3MoeForCausalLM",
        {
            **HEADS_OF_32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        },
    ),
    Specimen(
        "deepseek-v2",
        "MLA, shared and routed experts",
        "DeepseekV2ForCausalLM",
        {**MLA, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    ),
    Specimen("deepseek-v3", "MLA, experts with a bias on routing", "DeepseekV3ForCausalLM", DEEPSEEK_V3),
    Specimen(
        "mamba",
        "state space, no attention",
        "MambaForCausalLM",
        {
            "vocab_size": 256,
            "hidden_size": 128,
            "state_size": 16,
            "num_hidden_layers": 2,
            "conv_kernel": 4,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        },
        cannot_answer={"cpu": "vLLM's CPU build has no kernel for it"},
    ),
    Specimen(
        "lfm2",
        "hybrid: short convolutions and attention",
        "Lfm2ForCausalLM",
        {
            **SMALL,
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            "conv_dim": 128,
            "conv_dim_out": 128,
            "block_dim": 128,
            "block_multiple_of": 32,
        },
    ),
    Specimen(
        "qwen3-next",
        "hybrid: gated delta net, attention, experts",
        "Qwen3NextForCausalLM",
        {
            **HEADS_OF_32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
        },
    ),
    Specimen(
        "paligemma",
        "multimodal: SigLIP tower, projector, Gemma",
        "PaliGemmaForConditionalGeneration",
        {
            "vision_config": {**VISION, "model_type": "siglip_vision_model"},
            "text_config": {**HEADS_OF_32, "model_type": "gemma", "tie_word_embeddings": True},
            "image_token_index": IMAGE,
            "projection_dim": 128,
            "hidden_size": 128,
            "pad_token_id": 247,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        finish=("paligemma-processor",),
        engine_arguments={"skip_tokenizer_init": False},
        media="image",
        media_token=IMAGE,
        cannot_run={"without-torchvision": "No module named 'torchvision'"},
    ),
    Specimen(
        "qwen2-audio",
        "multimodal: audio tower, projector, Qwen2",
        "Qwen2AudioForConditionalGeneration",
        {
            "audio_config": {
                "model_type": "qwen2_audio_encoder",
                "num_mel_bins": 80,
                "d_model": 64,
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 128,
            },
            "text_config": {**SMALL, "model_type": "qwen2", "max_position_embeddings": 2048},
            "audio_token_index": AUDIO,
            "vocab_size": 256,
        },
        finish=("qwen2-audio-names", "qwen2-audio-processor"),
        engine_arguments={"skip_tokenizer_init": False, "max_model_len": 1024, "max_num_batched_tokens": 2048},
        media="audio",
        media_token=AUDIO,
    ),
    Specimen(
        "llava",
        "multimodal: CLIP tower, projector, Llama",
        "LlavaForConditionalGeneration",
        {
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "text_config": {**SMALL, "model_type": "llama"},
            "image_token_index": IMAGE,
            "image_seq_length": 16,
        },
        finish=("llava-processor",),
        engine_arguments={"skip_tokenizer_init": False},
        media="image",
        media_token=IMAGE,
        cannot_run=NOT_INSPECTED,
    ),
    Specimen(
        "qwen2-vl",
        "multimodal: tower with rotary positions",
        "Qwen2VLForConditionalGeneration",
        {
            "vision_config": {
                "depth": 2,
                "embed_dim": 64,
                "num_heads": 2,
                "hidden_size": 128,
                "mlp_ratio": 2,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            "text_config": {
                **SMALL,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            },
            "vision_start_token_id": VISION_START,
            "vision_end_token_id": VISION_END,
            "image_token_id": IMAGE_PAD,
            "video_token_id": VIDEO_PAD,
        },
        finish=("qwen2-vl-processor",),
        engine_arguments={"skip_tokenizer_init": False},
        media="image",
        media_token=IMAGE_PAD,
        cannot_run=NOT_INSPECTED,
    ),
    Specimen(
        "bert",
        "embedding model, encoder only",
        "BertModel",
        {**PLAIN, "pad_token_id": 0},
        finish=("tokenizer",),
        asks=EMBED,
        engine_arguments={"runner": "pooling", "skip_tokenizer_init": False},
    ),
    Specimen(
        "qwen3-embedding",
        "embedding model made of a decoder",
        "Qwen3ForCausalLM",
        HEADS_OF_32,
        finish=("tokenizer",),
        asks=EMBED,
        engine_arguments={"runner": "pooling", "convert": "embed", "skip_tokenizer_init": False},
    ),
    Specimen(
        "draft-pair",
        "a target and a draft model",
        "LlamaForCausalLM",
        SMALL,
        finish=("draft",),
        engine_arguments={
            "speculative_config": {"method": "draft_model", "model": "{folder}/draft", "num_speculative_tokens": 2}
        },
        models=2,
    ),
    Specimen(
        "eagle-pair",
        "a target and an EAGLE head that shares its embeddings",
        "LlamaForCausalLM",
        SMALL,
        finish=("eagle-head",),
        engine_arguments={
            "speculative_config": {"method": "eagle", "model": "{folder}/draft", "num_speculative_tokens": 2}
        },
        models=2,
        not_in_checkpoint=(("EagleLlamaForCausalLM", "model.embed_tokens.weight"),),
    ),
    Specimen(
        "mimo-mtp",
        "a target and its MTP layer",
        "Qwen2ForCausalLM",
        {**SMALL, "num_hidden_layers": 3},
        finish=("mimo-mtp",),
        engine_arguments={"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}},
        models=2,
    ),
    Specimen(
        "deepseek-mtp",
        "MLA and experts, with an MTP layer",
        "DeepseekV3ForCausalLM",
        {**DEEPSEEK_V3, "num_hidden_layers": 3},
        finish=("deepseek-mtp",),
        engine_arguments={"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}},
        models=2,
    ),
    Specimen(
        "llama-lora",
        "a LoRA adapter on the forked base",
        "LlamaForCausalLM",
        SMALL,
        finish=("adapter",),
        engine_arguments={"enable_lora": True, "max_lora_rank": 8},
        adapter=True,
    ),
    Specimen("llama-int8", "compressed-tensors W8A8", "LlamaForCausalLM", SMALL, finish=("int8",)),
    Specimen("llama-gptq", "GPTQ, four bits", "LlamaForCausalLM", SMALL, finish=("gptq",), needs_files=READS_HEADERS),
    Specimen("llama-awq", "AWQ, four bits", "LlamaForCausalLM", SMALL, finish=("awq",), needs_files=READS_HEADERS),
    Specimen(
        "llama-fp8",
        "FP8, a scale per tensor",
        "LlamaForCausalLM",
        SMALL,
        finish=("fp8",),
        cannot_run={"cpu": "_C::static_scaled_fp8_quant()"},
    ),
    Specimen("llama-fp8-channels", "FP8, a scale per channel", "LlamaForCausalLM", SMALL, finish=("fp8-channels",)),
    Specimen(
        "llama-fp8-blocks",
        "FP8, a scale per block",
        "LlamaForCausalLM",
        {**SMALL, "num_key_value_heads": 4},  # keys and values fill whole blocks
        finish=("fp8-blocks",),
        cannot_run={"cpu-without-amx": "Failed to find a kernel that can implement the ScaledMM linear layer"},
    ),
    Specimen("llama-tp2", "two ranks", "LlamaForCausalLM", SMALL, ranks=2),
    Specimen(
        "qwen2-tied-tp2",
        "two ranks, tied embeddings",
        "Qwen2ForCausalLM",
        {**SMALL, "tie_word_embeddings": True},
        ranks=2,
    ),
    Specimen("mixtral-tp2", "two ranks, experts", "MixtralForCausalLM", {**SMALL, "num_local_experts": 4}, ranks=2),
]
