"""Keys of Lightning, Transformers, Accelerate and torchrun, and which of ours does the same."""

from __future__ import annotations

_KEYS = {
    "run.name": "run_name experiment experiment_name exp_name project",
    "run.directory": (
        "default_root_dir output_dir work_dir save_dir log_dir logging_dir out_dir exp_dir dirpath"
    ),
    "run.seed": "random_seed manual_seed data_seed global_seed",
    "run.max_seconds": "max_time time_limit",
    "data.train": (
        "data path data_dir data_path root train_data train_path train_dir train_file train_files "
        "dataset dataset_name dataset_path train_dataset"
    ),
    "data.validation": (
        "val valid eval dev val_data valid_data validation_data eval_data val_path val_dir "
        "validation_file eval_dataset val_dataset"
    ),
    "data.test": "test_data test_path test_dir test_file test_dataset",
    "data.global_batch_size": (
        "batch batch_size train_batch_size total_batch_size effective_batch_size batchsize"
    ),
    "data.micro_batch_size": (
        "per_device_train_batch_size per_device_eval_batch_size per_device_batch_size "
        "per_gpu_batch_size device_batch_size train_micro_batch_size_per_gpu eval_batch_size "
        "val_batch_size"
    ),
    "data.workers": "num_workers n_workers dataloader_num_workers num_proc",
    "model.use": "model.name model.type model.arch model.architecture model.class_path model_name",
    "optimizer.use": "optim optimizer_name optimizer_type optimizer.name optimizer.type",
    "optimizer.lr": "lr learning_rate base_lr max_lr peak_lr init_lr",
    "optimizer.weight_decay": "weight_decay wd",
    "scheduler.use": (
        "lr_scheduler lr_scheduler_type lr_schedule lr_scheduler_name scheduler_name "
        "scheduler.name scheduler.type"
    ),
    "scheduler.warmup_steps": "warmup warmup_steps warmup_ratio num_warmup_steps warmup_iters",
    "task.use": "loss loss_fn criterion task.name task.type",
    "training.max_epochs": "epochs epoch num_epochs num_train_epochs n_epochs max_epoch",
    "training.max_steps": (
        "steps num_steps n_steps num_train_steps num_training_steps max_train_steps total_steps "
        "max_iters iterations num_iterations train_iters"
    ),
    "training.precision": (
        "fp16 bf16 fp32 fp64 tf16 half amp use_amp mixed_precision torch_dtype amp_level"
    ),
    "training.strategy": (
        "fsdp ddp deepspeed zero zero_stage sharding sharding_strategy distributed_strategy "
        "parallelism distributed_type"
    ),
    "training.shard": "auto_wrap_policy wrap_policy fsdp_transformer_layer_cls_to_wrap fsdp_config",
    "training.clip_norm": (
        "gradient_clip_val gradient_clipping max_grad_norm grad_clip clip_grad clip_grad_norm "
        "grad_norm_clip gradient_clip clip_gradient max_norm"
    ),
    "training.evaluate_every_steps": (
        "val_check_interval eval_steps eval_interval eval_every eval_freq val_interval"
    ),
    "training.evaluate_every_epochs": (
        "check_val_every_n_epoch eval_strategy evaluation_strategy eval_epochs val_every"
    ),
    "training.limit_validation_batches": "limit_val_batches limit_eval_batches eval_iters",
    "training.activation_checkpointing": (
        "gradient_checkpointing activation_checkpoint activation_checkpoints checkpoint_activations"
    ),
    "training.compile": "torch_compile compile_model",
    "training.compile_mode": "torch_compile_mode",
    "training.unused_parameters": "find_unused_parameters ddp_find_unused_parameters",
    "training.bucket_mb": "bucket_cap_mb ddp_bucket_cap_mb",
    "training.sync_batchnorm": "sync_bn sync_batch_norm",
    "training.cudnn_benchmark": "benchmark",
    "checkpoint.every_steps": (
        "save_steps every_n_train_steps save_interval save_every save_freq checkpoint_interval"
    ),
    "checkpoint.every_epochs": (
        "every_n_epochs save_strategy save_every_n_epochs enable_checkpointing"
    ),
    "checkpoint.every_minutes": "train_time_interval",
    "checkpoint.keep_last": "save_total_limit save_last max_checkpoints keep_checkpoints",
    "checkpoint.keep_best": "metric_for_best_model checkpoint.monitor load_best_model_at_end",
    "checkpoint.keep_best_mode": "greater_is_better checkpoint.mode",
    "checkpoint.keep_best_count": "save_top_k",
    "checkpoint.resume": "resume_from resume_from_checkpoint ckpt_path resume_path checkpoint_path",
    "checkpoint.initialize_from": (
        "pretrained pretrained_weights load_from init_from from_pretrained finetune_from "
        "pretrained_model_name_or_path model_name_or_path"
    ),
    "early_stopping.patience": "early_stopping_patience",
    "early_stopping.min_delta": "early_stopping_threshold min_improvement",
    "launch.device": "accelerator use_cpu use_gpu no_cuda cuda cpu device_type",
    "launch.backend": "ddp_backend dist_backend distributed_backend process_group_backend",
    "launch.hang_timeout_seconds": "timeout ddp_timeout nccl_timeout",
    "logging.every_steps": (
        "log_every_n_steps every_n_steps logging_steps log_interval log_every log_freq print_freq"
    ),
    "logging.progress": (
        "enable_progress_bar disable_tqdm progress_bar tqdm progress_bar_refresh_rate"
    ),
    "profile.active_steps": "profiler profiling",
    "job.nodes": "num_nodes nnodes num_machines",
    "job.time": "walltime wall_time",
    "job.queue": "partition",
}
"""By key of ours: names that others have for it, in any section or in one."""

_PHRASES = {
    "data.micro_batch_size makes several passes of a step": (
        "gradient_accumulation_steps accumulate_grad_batches grad_accum_steps grad_accum "
        "gradient_accumulation accum_steps accumulation_steps accumulate_grad"
    ),
    "the launcher decides on the ranks: mpirun -np N, srun, or --np N": (
        "devices gpus num_gpus n_gpus ngpus num_devices num_processes nproc nproc_per_node "
        "gpus_per_rank world_size local_rank rank node_rank launch.num_ranks"
    ),
    "ranks find each other; launch.address and launch.interface choose where": (
        "master_addr master_port main_process_ip main_process_port rdzv_endpoint init_method"
    ),
    "samples are read ahead; data.buffer_mb bounds the memory for it": (
        "pin_memory persistent_workers prefetch_factor prefetch dataloader_pin_memory"
    ),
    "[[trackers]] send metrics elsewhere": (
        "logger loggers report_to tracker wandb tensorboard mlflow comet log_with"
    ),
    "[[callbacks]] is a section of its own": "callbacks callback",
    "[early_stopping] is a section of its own": "early_stopping early_stop",
}
"""The same, where it is no one key."""

_SECTIONS = {
    "training": "trainer train training_args training_arguments fit",
    "data": "dataset datasets dataloader datamodule loader train_data",
    "optimizer": "optim optimiser optimizers",
    "scheduler": "lr_scheduler sched",
    "checkpoint": "checkpoints checkpointing ckpt model_checkpoint",
    "model": "net network module arch",
    "logging": "log",
    "job": "slurm sbatch cluster resources pbs lsf flux",
    "launch": "distributed dist",
    "profile": "profiler",
    "task": "loss criterion",
    "run": "experiment general project",
}

_OURS = {name: ours for ours, names in _KEYS.items() for name in names.split()}
_SAID = {name: phrase for phrase, names in _PHRASES.items() for name in names.split()}
_SECTION = {name: ours for ours, names in _SECTIONS.items() for name in names.split()}


def own_key(section: str, key: str) -> str | None:
    """Return our key, "training.max_epochs", that somebody else's stands for; None: of none."""
    name = key.lower().replace("-", "_")
    return _OURS.get(f"{section}.{name}") or _OURS.get(name)


def instead_of(section: str, key: str) -> str | None:
    """Return in words what there is in place of somebody else's key; None: nothing is known."""
    if (ours := own_key(section, key)) is not None:
        return f"did you mean {ours}?"
    return _SAID.get(key.lower().replace("-", "_"))


def own_section(name: str) -> str | None:
    """Return our section that somebody else's stands for; None: of none that is known."""
    return _SECTION.get(name.lower().replace("-", "_"))


def instead_of_section(name: str) -> str | None:
    """Return in words what there is in place of somebody else's section."""
    if (ours := own_section(name)) is not None:
        return f"did you mean {ours}?"
    return instead_of("", name)
