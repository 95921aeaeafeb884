"""Every interface of vLLM and vLLM-Ascend that a fork relies on: module, symbol, call, and range of versions.

A test compares this with the imports of ``vllm_rfork`` and the attributes that it reads: it fails for an interface that
is used and not here, or here and not used.
"""

from __future__ import annotations

from dataclasses import dataclass

VLLM, ASCEND = "vllm", "vllm-ascend"


@dataclass(frozen=True)
class Row:
    """One interface.

    Attributes:
        module: dotted, as it is imported.
        symbol: a name in the module, or ``Class.member``; empty for the module itself.
        takes: keyword arguments that we pass; every other parameter must have a default. None if it is not called.
        positional: arguments that we pass by position, after ``self``.
        calls: names that its body must call, itself or through other methods of the class, in this order.
        since: first version that has it; our code must work without it before.
        until: first version that does not have it any more; likewise.
        package: whose releases have it.
    """

    module: str
    symbol: str = ""
    takes: tuple[str, ...] | None = None
    positional: int = 0
    calls: tuple[str, ...] = ()
    since: str = ""
    until: str = ""
    package: str = VLLM

    @property
    def key(self) -> str:
        """Its name in messages and records."""
        return f"{self.module}:{self.symbol}"


def members(module: str, cls: str, *names: str, since: str = "", until: str = "") -> tuple[Row, ...]:
    """Rows for attributes of a class, which are read from its instances."""
    return tuple(Row(module, f"{cls}.{name}", since=since, until=until) for name in names)


_LOADER = "vllm.model_executor.model_loader"
_BASE = f"{_LOADER}.base_loader"
_STATE = "vllm.distributed.parallel_state"
_REGISTRY = "vllm.model_executor.models.registry"
_PLAN = "vllm.v1.worker.startup_plan"
_WARM_UP = "vllm.model_executor.warmup.kernel_warmup"

ROWS: tuple[Row, ...] = (
    # --- registration -----------------------------------------------------------------------------------------------
    Row("vllm", "__version__"),
    Row(_LOADER, "register_model_loader", takes=(), positional=1),
    Row(_LOADER, "_LOAD_FORMAT_TO_MODEL_LOADER"),
    Row(_LOADER, "get_model_loader", takes=(), positional=1),
    Row("vllm.engine.arg_utils", "EngineArgs.create_engine_config"),
    Row("vllm.platforms", "current_platform"),
    # --- start-up plans and autotune tables -------------------------------------------------------------------------
    Row(_PLAN, since="0.26.0"),
    Row(_PLAN, "compute_plan_fingerprint", takes=(), positional=3, since="0.26.0"),
    Row("vllm.v1.worker.gpu_worker"),
    Row("vllm.v1.worker.gpu_worker", "maybe_apply_startup_plan", since="0.26.0"),
    Row("vllm.v1.worker.gpu_worker", "maybe_save_startup_plan", since="0.26.0"),
    Row("vllm.v1.worker.gpu_worker", "Worker.determine_available_memory", takes=()),
    Row("vllm.v1.worker.gpu_worker", "Worker.get_kv_cache_spec", takes=()),
    Row("vllm.v1.kv_cache_interface", "KVCacheSpec.max_memory_usage_bytes", takes=(), positional=1),
    Row("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.capture_model", takes=()),
    Row("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.profile_cudagraph_memory", takes=(), since="0.18.0"),
    *members("vllm.config.cache", "CacheConfig", "kv_cache_memory_bytes", "gpu_memory_utilization"),
    *members("vllm.config.compilation", "CompilationConfig", "cudagraph_mode"),
    Row(_WARM_UP),
    Row(_WARM_UP, "flashinfer_autotune", takes=(), positional=1),
    Row(_WARM_UP, "resolve_flashinfer_autotune_file", since="0.24.0", until="0.33.0"),
    Row(_WARM_UP, "resolve_rank_flashinfer_autotune_file", since="0.33.0"),
    Row(_WARM_UP, "_all_ranks_have_matching_cache", since="0.31.0"),
    # --- model information ------------------------------------------------------------------------------------------
    Row(_REGISTRY, "ModelRegistry"),
    *members(_REGISTRY, "_ModelRegistry", "models"),
    Row(_REGISTRY, "_ModelInfo"),
    Row(_REGISTRY, "_LazyRegisteredModel"),
    Row(_REGISTRY, "_LazyRegisteredModel.class_name"),
    Row(_REGISTRY, "_LazyRegisteredModel._get_cache_filename", takes=()),
    Row(_REGISTRY, "_LazyRegisteredModel._load_modelinfo_from_cache", takes=(), positional=1),
    Row("vllm.platforms.interface", "Platform.is_cpu", takes=()),
    # --- the loader's flow ------------------------------------------------------------------------------------------
    Row(_BASE, "BaseModelLoader"),
    Row(_BASE, "BaseModelLoader.__init__", takes=(), positional=1),
    Row(_BASE, "BaseModelLoader.load_config"),
    Row(_BASE, "BaseModelLoader.download_model", takes=(), positional=1),
    Row(_BASE, "BaseModelLoader.load_weights", takes=(), positional=2),
    Row(
        _BASE,
        "BaseModelLoader.load_model",
        takes=("vllm_config", "model_config", "prefix"),
        calls=("initialize_model", "load_weights", "process_weights_after_loading"),
    ),
    Row(f"{_LOADER}.default_loader", "DefaultModelLoader.get_all_weights", takes=(), positional=2),
    Row(f"{_LOADER}.dummy_loader", "DummyModelLoader.load_weights", takes=(), positional=2),
    *members(
        "vllm.config.load",
        "LoadConfig",
        "load_format",
        "model_loader_extra_config",
        "device",
        "use_tqdm_on_load",
        "download_dir",
    ),
    Row(f"{_LOADER}.tensorizer", "TensorizerConfig"),
    Row(f"{_LOADER}.utils"),
    Row(f"{_LOADER}.utils", "get_draft_load_config", takes=(), positional=1, since="0.32.0"),
    Row("vllm.model_executor.layers.vocab_parallel_embedding", "ParallelLMHead"),
    Row("vllm.model_executor.layers.vocab_parallel_embedding", "VocabParallelEmbedding"),
    # --- a worker's ranks -------------------------------------------------------------------------------------------
    Row(_STATE, "get_world_group", takes=()),
    Row(_STATE, "get_pp_group", takes=()),
    Row(_STATE, "get_ep_group", takes=()),
    Row(_STATE, "get_pcp_group", takes=()),
    Row(_STATE, "get_tensor_model_parallel_rank", takes=()),
    *members(_STATE, "GroupCoordinator", "rank", "local_rank", "rank_in_group"),
    Row(_STATE),
    # --- configuration ----------------------------------------------------------------------------------------------
    # The traversal skips objects of classes in these modules.
    Row("vllm.config"),
    Row("vllm.distributed"),
    Row("vllm.compilation"),
    Row("vllm.scalar_type"),
    Row("vllm_ascend.distributed", package=ASCEND),
    *members(
        "vllm.config.vllm",
        "VllmConfig",
        "model_config",
        "scheduler_config",
        "parallel_config",
        "cache_config",
        "offload_config",
        "load_config",
        "device_config",
        "compilation_config",
        "speculative_config",
        "kv_transfer_config",
        "quant_config",
        "additional_config",
        "lora_config",
    ),
    *members("vllm.config.device", "DeviceConfig", "device"),
    *members(
        "vllm.config.compilation", "CompilationConfig", "static_forward_context", "static_all_moe_layers", "custom_ops"
    ),
    *members(
        "vllm.config.model",
        "ModelConfig",
        "hf_config",
        "is_moe",
        "runner_type",
        "convert_type",
        "enable_sleep_mode",
        "multimodal_config",
        "seed",
        "model",
        "model_weights",
        "revision",
        "architectures",
        "architecture",
        "_model_info",
        "enforce_eager",
    ),
    *members("vllm.config.model", "ModelConfig", "enable_cumem_allocator", since="0.23.0"),
    Row("vllm.config.model", "ModelConfig.get_num_experts", takes=()),
    *members(
        "vllm.config.parallel",
        "ParallelConfig",
        "enable_expert_parallel",
        "enable_eplb",
        "eplb_config",
        "node_rank",
        "data_parallel_rank_local",
        "data_parallel_index",
        "data_parallel_rank",
        "enable_elastic_ep",
        "disable_custom_all_reduce",
        "distributed_executor_backend",
        "world_size",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "prefill_context_parallel_size",
    ),
    *members("vllm.config.cache", "CacheConfig", "calculate_kv_scales", until="0.30.0"),
    *members("vllm.config.cache", "CacheConfig", "cpu_offload_gb", until="0.18.0"),
    *members("vllm.config.vllm", "VllmConfig", "offload_config", since="0.18.0"),
    *members("vllm.config.offload", "OffloadConfig", "uva", "prefetch", since="0.18.0"),
    *members("vllm.config.offload", "UVAOffloadConfig", "cpu_offload_gb", since="0.18.0"),
    *members("vllm.config.offload", "PrefetchOffloadConfig", "offload_group_size", since="0.18.0"),
    *members("vllm.config.cache", "CacheConfig", "cpu_offload_gb", until="0.18.0"),
    *members("vllm.config.kv_transfer", "KVTransferConfig", "kv_role"),
    *members("vllm.config.speculative", "SpeculativeConfig", "draft_model_config", "target_model_config"),
    *members("vllm.config.speculative", "SpeculativeConfig", "draft_load_config", since="0.23.0"),
    Row("vllm.config", "VllmConfig"),
    Row("vllm.config.vllm", "VllmConfig.__post_init__", takes=()),
    # --- the key of compiled code -----------------------------------------------------------------------------------
    Row("vllm.config.utils", "hash_factors", takes=(), positional=1),
    Row("vllm.config.vllm", "VllmConfig.compute_hash", takes=()),
    Row("vllm.envs", "compile_factors", takes=()),
    Row("vllm.compilation.compiler_interface", "get_inductor_factors", takes=()),
    # --- caches of compiled code ------------------------------------------------------------------------------------
    Row("vllm.compilation.decorators", "_try_load_aot_compiled_fn", takes=(), positional=2, since="0.18.0"),
    Row("vllm.compilation.backends", "VllmBackend"),
    Row("vllm.compilation.backends", "VllmBackend.__call__"),
    *members("vllm.compilation.backends", "VllmBackend", "vllm_config", "compilation_config", "compiler_manager"),
    Row("vllm.compilation.backends", "CompilerManager"),
    Row(
        "vllm.compilation.backends",
        "CompilerManager.initialize_cache",
        takes=("cache_dir", "disable_cache", "prefix"),
        positional=3,
    ),
    Row("vllm.compilation.backends", "CompilerManager.save_to_file", takes=()),
    *members("vllm.compilation.backends", "CompilerManager", "cache", "is_cache_updated"),
    *members("vllm.config.compilation", "CompilationConfig", "traced_files"),
    # --- process-wide state and workers -----------------------------------------------------------------------------
    Row("vllm.model_executor.layers.rotary_embedding", "_ROPE_DICT"),
    Row("vllm.model_executor.models.utils"),  # its _model_to_pp_missing_layer_names
    Row("vllm.model_executor.layers.hpc.rope_norm", since="0.32.0"),  # its _hpc_rope_norm_instances
    Row("vllm.v1.worker.worker_base", "WorkerBase"),
    Row("vllm.v1.worker.worker_base", "WorkerBase.__init__"),
    *members("vllm.v1.worker.worker_base", "WorkerBase", "vllm_config", "init_device"),
    Row("vllm.v1.worker.worker_base", "WorkerWrapperBase"),
    Row("vllm.v1.worker.worker_base", "WorkerWrapperBase.__getattr__", takes=(), positional=1),
    Row("vllm.v1.serial_utils", "run_method", takes=(), positional=4),
    Row("vllm.v1.executor.multiproc_executor", "cloudpickle"),
    Row("vllm.ray.ray_env", "RAY_NON_CARRY_OVER_ENV_VARS"),
    # --- vLLM-Ascend ------------------------------------------------------------------------------------------------
    # Names that are looked up in loaded modules, and may be absent, are in ``tests/ascend``.
    Row("vllm_ascend.model_loader.rfork.rfork_loader", package=ASCEND),
)

#: Attributes of objects of several classes, with one of the classes.
ELSEWHERE: tuple[Row, ...] = (
    Row("vllm.model_executor.layers.quantization.base_config", "QuantizeMethodBase.uses_meta_device"),
)

#: Workers whose public methods, in every release, either withdraw the seed (``vllm_compat/worker_hooks.py``) or do not
#: change weights (``vllm_compat/worker_calls.py``).
WORKERS: dict[str, tuple[tuple[str, str], ...]] = {
    VLLM: (
        ("vllm.v1.worker.worker_base", "WorkerBase"),
        ("vllm.v1.worker.gpu_worker", "Worker"),
        ("vllm.v1.worker.cpu_worker", "CPUWorker"),
        ("vllm.v1.worker.xpu_worker", "XPUWorker"),
    ),
    ASCEND: (("vllm_ascend.worker.worker", "NPUWorker"),),
}

#: Configurations whose fields, in every release, are in a table of ``vllm_compat/fingerprint`` or in its ignored.json.
CONFIGURATIONS: dict[str, tuple[str, str]] = {
    "vllm": ("vllm.config.vllm", "VllmConfig"),
    "model": ("vllm.config.model", "ModelConfig"),
    "multimodal": ("vllm.config.multimodal", "MultiModalConfig"),
    "parallel": ("vllm.config.parallel", "ParallelConfig"),
    "eplb": ("vllm.config.parallel", "EPLBConfig"),
    "cache": ("vllm.config.cache", "CacheConfig"),
    "load": ("vllm.config.load", "LoadConfig"),
    "device": ("vllm.config.device", "DeviceConfig"),
    "kv_transfer": ("vllm.config.kv_transfer", "KVTransferConfig"),
    "scheduler": ("vllm.config.scheduler", "SchedulerConfig"),
    "speculative": ("vllm.config.speculative", "SpeculativeConfig"),
}

#: The mapping of environment variables that a release reads: its module and name.
ENVIRONMENT = {VLLM: ("vllm.envs", "environment_variables"), ASCEND: ("vllm_ascend.envs", "env_variables")}
