"""`deepspeed` itself."""

from __future__ import annotations

from unishard.deepspeed.entries import Names, absent, elsewhere, module, part
from unishard.deepspeed.surface.reasons import DATA, EXPERTS, INFERENCE, PIPELINE, TENSOR

ROOT: dict[str, Names] = {
    "": {
        **part("initialize", "initialize", "add_config_arguments"),
        **part("engine", "DeepSpeedEngine"),
        **part("config_object", "DeepSpeedConfig"),
        **part("configuration", "DeepSpeedConfigError"),
        **part("collectives", "init_distributed"),
        **part("inference", "init_inference", "tp_model_init", note="without tensor parallelism only"),
        **part("inference", "InferenceEngine", "default_inference_config"),
        **part("on_device", "OnDevice"),
        **part("logs", "logger", "log_dist"),
        **part("accelerator", "get_accelerator"),
        **part("zero_optimizers", "DeepSpeedOptimizer"),
        **part("data", "DeepSpeedDataLoader"),
        **elsewhere("torch.optim", DeepSpeedOptimizerCallable="Optimizer"),
        **elsewhere("torch.optim.lr_scheduler", DeepSpeedSchedulerCallable="LRScheduler"),
        "version": elsewhere("unishard.deepspeed.release", version="VERSION")["version"],
        "zero": module("runtime.zero"),
        "checkpointing": module("runtime.activation_checkpointing.checkpointing"),
        **absent(PIPELINE, "PipelineModule", "PipelineEngine", "DualPipeVEngine", "DualPipeVModule"),
        **absent(
            INFERENCE, "DeepSpeedInferenceConfig", "DeepSpeedTransformerLayer", "DeepSpeedTransformerConfig"
        ),
        **absent(INFERENCE, "DeepSpeedHybridEngine", "replace_transformer_layer"),
        **absent(TENSOR, "set_autotp_mode"),
    },
    "constants": {
        **part(
            "names",
            "TORCH_DISTRIBUTED_DEFAULT_PORT",
            "default_pg_timeout",
            "INFERENCE_GENERIC_MODE",
            "INFERENCE_SPECIALIZED_MODE",
            "CROSS_RANK",
            "CROSS_SIZE",
            "LOCAL_RANK",
        )
    },
    "git_version_info": {
        **elsewhere("unishard.deepspeed.release", version="VERSION"),
        **part("names", "git_hash", "git_branch", "installed_ops", "torch_info", "accelerator_name"),
    },
    "env_report": {**part("report", "main", "cli_main")},
    "inference": {},
    "inference.engine": {**part("inference", "InferenceEngine")},
    "inference.config": {**absent(INFERENCE, "DeepSpeedInferenceConfig", "DeepSpeedTPConfig", "DtypeEnum")},
    "module_inject": {
        **absent(TENSOR, "replace_transformer_layer", "LinearAllreduce", "LinearLayer", "set_autotp_mode")
    },
    "module_inject.layers": {**absent(TENSOR, "LinearAllreduce", "LinearLayer", "GatherReplacedLayerParams")},
    "module_inject.auto_tp": {**absent(TENSOR, "AutoTP")},
    "compression": {},
    "compression.helper": {**absent("DeepSpeed removed most of it; use torch.ao", "recursive_getattr")},
    "linear": {
        **absent("use peft for LoRA", "OptimizedLinear", "LoRAConfig", "QuantizationConfig", "init_lora")
    },
    "runtime.hybrid_engine": {**absent(INFERENCE, "DeepSpeedHybridEngine")},
    "runtime.data_pipeline.curriculum_scheduler": {**absent(DATA, "CurriculumScheduler")},
    "runtime.data_pipeline.data_sampling.data_sampler": {**absent(DATA, "DeepSpeedDataSampler")},
    "runtime.data_pipeline.data_sampling.indexed_dataset": {
        **absent(DATA, "MMapIndexedDataset", "MMapIndexedDatasetBuilder", "make_builder", "make_dataset")
    },
    "runtime.data_pipeline.data_sampling.data_analyzer": {
        **absent(DATA, "DataAnalyzer", "DistributedDataAnalyzer")
    },
    "runtime.data_pipeline.data_routing.basic_layer": {**absent(DATA, "RandomLayerTokenDrop")},
    "runtime.data_pipeline.data_routing.helper": {
        **absent(DATA, "convert_to_random_ltd", "save_without_random_ltd", "remove_random_ltd_state_dict")
    },
    "moe": {},
    "moe.experts": {**absent(EXPERTS, "Experts")},
}
