"""Every argument of Lightning's Trainer: keys of the config, accepted, or refused."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import lightning.pytorch as lightning
import pytest
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

from hpctrain.config.choices import choices
from hpctrain.config.schema import Config
from hpctrain.errors import ConfigError
from hpctrain.lightning.arguments import (
    NEVER,
    Mapped,
    TrainerArguments,
    evaluation_keys,
    mapped,
    parse,
)
from hpctrain.lightning.objects import KEEP_ALL, known

EVERY = {
    "training.max_epochs": 1000,
    "training.evaluate_every_epochs": 1,
    "run.deterministic": False,
    "training.cudnn_benchmark": False,
    "training.sync_batchnorm": False,
    "logging.every_steps": 50,
}
"""What a Trainer without arguments says, as Lightning has it."""


def named(value: object) -> str:
    """Return how a test is called: the same in every process, without places in memory."""
    return re.sub(r" object at 0x[0-9a-f]+", "", str(value))


def of(env: Mapping[str, str] | None = None, **given: Any) -> Mapped:
    return mapped(parse(given, {}), choices(env or {}))


def new(**given: Any) -> dict[str, Any]:
    """The keys that arguments say beside those that are always said."""
    return {key: value for key, value in of(**given).keys.items() if EVERY.get(key) != value}


def test_the_arguments_are_those_of_the_installed_lightning_with_their_defaults() -> None:
    there = inspect.signature(lightning.Trainer).parameters
    here = {each.name: each.default for each in dataclasses.fields(TrainerArguments)}
    assert here.pop("overrides") == ()
    assert here == {name: each.default for name, each in there.items()}


def test_without_arguments() -> None:
    found = of()
    assert found.keys == EVERY
    assert (found.devices, found.num_nodes) == (None, None)


def test_every_key_is_one_of_the_config() -> None:
    sections = inspect.get_annotations(Config, eval_str=True)
    given = of(
        accelerator="gpu",
        precision=16,
        strategy="deepspeed_stage_2_offload",
        max_time="00:01:00:00",
        enable_progress_bar=False,
        gradient_clip_val=1,
        callbacks=[
            theirs.ModelCheckpoint(monitor="a", every_n_train_steps=5, save_top_k=-1),
            theirs.EarlyStopping("a", stopping_threshold=1.0, divergence_threshold=2.0),
        ],
        logger=CSVLogger("logs"),
    )
    for key in given.keys:
        section, _, name = key.partition(".")
        assert name in {each.name for each in dataclasses.fields(sections[section])}, key


@pytest.mark.parametrize(
    ("given", "keys"),
    [
        ({"accelerator": "cpu"}, {"launch.device": "cpu"}),
        ({"accelerator": "gpu"}, {"launch.device": "cuda"}),
        ({"accelerator": CPUAccelerator()}, {"launch.device": "cpu"}),
        ({"precision": "bf16"}, {"training.precision": "bf16-mixed"}),
        ({"precision": 64}, {"training.precision": "64-true"}),
        (
            {"strategy": "ddp_find_unused_parameters_true"},
            {"training.strategy": "ddp", "training.unused_parameters": "allow"},
        ),
        (
            {
                "strategy": DDPStrategy(
                    find_unused_parameters=True,
                    bucket_cap_mb=10,
                    ddp_comm_hook=fp16_compress_hook,
                    process_group_backend="gloo",
                )
            },
            {
                "training.strategy": "ddp",
                "training.unused_parameters": "allow",
                "training.bucket_mb": 10.0,
                "training.compress_gradients": "fp16",
                "launch.backend": "gloo",
            },
        ),
        (
            {"strategy": FSDPStrategy(sharding_strategy="SHARD_GRAD_OP")},
            {"training.strategy": "fsdp", "training.reshard_after_forward": False},
        ),
        (
            {"strategy": FSDPStrategy(cpu_offload=True, auto_wrap_policy={nn.Linear, nn.LSTM})},
            {
                "training.strategy": "fsdp",
                "training.cpu_offload": True,
                "training.shard": ["LSTM", "Linear"],
            },
        ),
        ({"strategy": FSDPStrategy(sharding_strategy="NO_SHARD")}, {"training.strategy": "ddp"}),
        ({"max_epochs": 3}, {"training.max_epochs": 3}),
        ({"max_steps": 7, "max_epochs": -1}, {"training.max_steps": 7}),
        ({"max_steps": 7}, {"training.max_steps": 7}),
        (
            {"max_epochs": 3, "max_steps": 7},
            {"training.max_epochs": 3, "training.max_steps": 7},
        ),
        ({"max_time": "01:00:00:01"}, {"run.max_seconds": 86401.0}),
        ({"max_time": {"minutes": 2}}, {"run.max_seconds": 120.0}),
        ({"max_time": timedelta(hours=1)}, {"run.max_seconds": 3600.0}),
        ({"limit_val_batches": 0}, {"training.evaluate_every_epochs": 0}),
        ({"check_val_every_n_epoch": 5}, {"training.evaluate_every_epochs": 5}),
        (
            {"check_val_every_n_epoch": None, "val_check_interval": 100},
            {"training.evaluate_every_epochs": 0, "training.evaluate_every_steps": 100},
        ),
        (
            {
                "check_val_every_n_epoch": None,
                "val_check_interval": 100,
                "accumulate_grad_batches": 4,
            },
            {"training.evaluate_every_epochs": 0, "training.evaluate_every_steps": 25},
        ),
        (
            {"limit_train_batches": 6, "limit_val_batches": 5, "accumulate_grad_batches": 2},
            {"training.limit_train_batches": 3, "training.limit_validation_batches": 5},
        ),
        (
            {"limit_train_batches": 0.5, "limit_val_batches": 1.0},
            {"training.limit_train_batches": 0.5},
        ),
        ({"profiler": "pytorch"}, {"profile.active_steps": 3}),
        ({"profiler": "simple"}, {}),
        ({"detect_anomaly": True}, {"training.detect_anomaly": True}),
        ({"overfit_batches": 1}, {"training.overfit_batches": 1}),
        ({"overfit_batches": 0.01}, {"training.overfit_batches": 0.01}),
        ({"fast_dev_run": True}, {"training.fast_dev_run": True}),
        ({"fast_dev_run": 7}, {"training.fast_dev_run": 7}),
        ({"log_every_n_steps": 5}, {"logging.every_steps": 5}),
        ({"log_every_n_steps": 0}, {"logging.every_steps": NEVER}),
        ({"enable_progress_bar": False}, {"logging.progress": "none"}),
        (
            {"enable_checkpointing": False},
            {"checkpoint.every_epochs": 0, "checkpoint.keep_last": 1},
        ),
        ({"gradient_clip_val": 0.25}, {"training.clip_norm": 0.25}),
        (
            {"gradient_clip_val": 1, "gradient_clip_algorithm": "value"},
            {"training.clip_value": 1.0},
        ),
        ({"gradient_clip_val": 0}, {}),
        ({"deterministic": True}, {"run.deterministic": True}),
        ({"benchmark": True}, {"training.cudnn_benchmark": True}),
        ({"sync_batchnorm": True}, {"training.sync_batchnorm": True}),
        (
            {"barebones": True},
            {
                "checkpoint.every_epochs": 0,
                "checkpoint.keep_last": 1,
                "logging.progress": "none",
                "logging.every_steps": NEVER,
            },
        ),
        ({"plugins": [LightningEnvironment()]}, {}),
        ({"logger": CSVLogger("logs", name="mine", version=3)}, {"run.directory": "logs/mine"}),
        ({"logger": False, "inference_mode": False, "use_distributed_sampler": False}, {}),
        ({"num_sanity_val_steps": 0, "enable_model_summary": False, "min_epochs": 0}, {}),
        (
            {"min_epochs": 2, "min_steps": 9},
            {"training.min_epochs": 2, "training.min_steps": 9},
        ),
        ({"enable_autolog_hparams": False}, {}),
    ],
    ids=named,
)
def test_argument(given: dict[str, Any], keys: dict[str, Any]) -> None:
    found = new(**given)
    found.pop("run.name", None)
    without = {"training.max_epochs"} - keys.keys()
    assert {key: value for key, value in found.items() if key not in without} == keys
    if "max_steps" in given and "max_epochs" not in keys:
        assert ("training.max_epochs" in of(**given).keys) == ("training.max_epochs" in keys)


@pytest.mark.parametrize(
    ("given", "way_out"),
    [
        ({"accelerator": "tpu"}, '"gpu"'),
        ({"accelerator": lightning.Callback()}, '"cpu"'),
        ({"precision": "16-true"}, "bf16-true"),
        ({"precision": "transformer-engine"}, "bf16-mixed"),
        ({"strategy": "xla"}, "ddp"),
        ({"strategy": ModelParallelStrategy()}, '"fsdp"'),
        (
            {
                "strategy": FSDPStrategy(
                    sharding_strategy="HYBRID_SHARD", auto_wrap_policy={nn.Linear}
                )
            },
            "FULL_SHARD",
        ),
        ({"strategy": FSDPStrategy(auto_wrap_policy=lambda *_: True)}, "by class"),
        ({"strategy": FSDPStrategy(ignored_modules=[])}, "ignored_modules"),
        ({"strategy": DDPStrategy(device_mesh=object())}, "device_mesh"),
        ({"strategy": DDPStrategy(ddp_comm_hook=lambda state, bucket: None)}, "fp16_compress_hook"),
        ({"devices": 0}, "from 1"),
        ({"devices": [1, 3]}, "CUDA_VISIBLE_DEVICES=1,3"),
        ({"devices": "many"}, '"auto"'),
        ({"devices": True}, '"auto"'),
        ({"num_nodes": 0}, "from 1"),
        ({"max_epochs": -1}, "max_time"),
        ({"max_epochs": 0}, "trainer.test"),
        ({"max_steps": None}, "-1: no limit"),
        ({"max_time": "an hour"}, "DD:HH"),
        ({"val_check_interval": "00:01:00:00"}, "number of batches"),
        ({"val_check_interval": 1.5}, "number of batches"),
        ({"check_val_every_n_epoch": None, "val_check_interval": 0.5}, "whole number"),
        ({"check_val_every_n_epoch": None}, "whole number"),
        (
            {
                "check_val_every_n_epoch": None,
                "val_check_interval": 5,
                "accumulate_grad_batches": 2,
            },
            "not a whole number of steps",
        ),
        ({"check_val_every_n_epoch": 0}, "from 1"),
        ({"accumulate_grad_batches": {0: 2}}, "one number"),
        ({"accumulate_grad_batches": 0}, "from 1"),
        ({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "sum"}, '"norm"'),
        ({"deterministic": "warn"}, "nothing in between"),
        ({"plugins": MixedPrecision("bf16-mixed", "cpu")}, "precision="),
        ({"barebones": True, "profiler": "simple"}, "leave out one"),
        ({"limit_train_batches": 0}, "trainer.validate"),
        ({"limit_train_batches": 5, "accumulate_grad_batches": 2}, "not a whole number of steps"),
        ({"limit_val_batches": 1.5}, "part of the data"),
        ({"overfit_batches": -1}, "part of the data"),
        ({"profiler": "advanced"}, "seconds of every phase"),
        ({"reload_dataloaders_every_n_epochs": 1}, "__getitem__"),
        ({"model_registry": "mine"}, "nothing is uploaded"),
        ({"max_epoch": 3}, "did you mean max_epochs"),
    ],
    ids=named,
)
def test_argument_that_cannot_be_had(given: dict[str, Any], way_out: str) -> None:
    with pytest.raises(ConfigError) as caught:
        of(**given)
    assert way_out in str(caught.value)
    assert caught.value.everywhere  # all ranks were given the same


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)3 mistakes.*tpu.*16-true.*deterministic"):
        of(accelerator="tpu", precision="16-true", deterministic="warn")


def test_arguments_from_the_environment_are_told() -> None:
    with pytest.raises(ConfigError, match="give the Trainer max_epochs="):
        parse({}, {"PL_TRAINER_MAX_EPOCHS": "3"})


@pytest.mark.parametrize(
    ("given", "places"),
    [
        ({}, (None, None)),
        ({"devices": -1}, (None, None)),
        ({"devices": "-1"}, (None, None)),
        ({"devices": 2}, (2, 1)),
        ({"devices": "2", "num_nodes": 3}, (2, 3)),
        ({"devices": [0, 1]}, (2, 1)),
        ({"devices": "0,1"}, (2, 1)),
        ({"num_nodes": 2}, (None, 2)),
        ({"strategy": "single_device"}, (1, 1)),
    ],
    ids=named,
)
def test_places(given: dict[str, Any], places: tuple[int | None, int | None]) -> None:
    found = of(**given)
    assert (found.devices, found.num_nodes) == places


def test_the_command_line_chooses_what_the_script_leaves_open() -> None:
    env = {"HPCTRAIN_ACCELERATOR": "gpu", "HPCTRAIN_PRECISION": "16", "HPCTRAIN_STRATEGY": "fsdp"}
    chosen = {
        "launch.device": "cuda",
        "training.precision": "16-mixed",
        "training.strategy": "fsdp",
    }
    assert of(env).keys == EVERY | chosen
    said = {
        "launch.device": "cpu",
        "training.precision": "32-true",
        "training.strategy": "ddp",
    }
    assert of(env, accelerator="cpu", precision=32, strategy="ddp").keys == EVERY | said


def test_evaluations_within_an_epoch() -> None:
    def keys(batches: int | None, **given: Any) -> dict[str, Any]:
        return evaluation_keys(parse(given, {}), batches)

    assert keys(None) == keys(None, val_check_interval=1.0) == {}
    steps = {"training.evaluate_every_epochs": 0, "training.evaluate_every_steps": 25}
    assert keys(100, val_check_interval=0.25) == steps
    assert keys(100, val_check_interval=25) == steps
    assert keys(100, val_check_interval=100) == {}
    assert keys(7, val_check_interval=25, check_val_every_n_epoch=None) == {}
    with pytest.raises(
        ConfigError, match="check_val_every_n_epoch=None with val_check_interval=30"
    ):
        keys(100, val_check_interval=0.3)
    with pytest.raises(ConfigError, match="not known yet"):
        keys(None, val_check_interval=0.25)


def test_every_callback_of_lightning_is_known() -> None:
    shipped = set(theirs.__all__) - {"Callback"}
    assert set(known()) == shipped


class Mine(lightning.Callback):
    pass


class Watching(theirs.ModelCheckpoint):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Never called, were it taken for its base."""


class Named(theirs.ModelCheckpoint):
    def __init__(self) -> None:
        super().__init__(monitor="val_loss", mode="max")


class Bar(theirs.TQDMProgressBar):
    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        return {}


def test_callbacks() -> None:
    mine, plain = Mine(), theirs.LambdaCallback(on_train_end=lambda *_: None)
    named, best = Named(), theirs.ModelCheckpoint(every_n_epochs=2)
    found = of(callbacks=[mine, Bar(), plain, theirs.LearningRateMonitor(), named])
    assert found.callbacks == [mine, plain]
    assert found.checkpoints == [named]
    assert found.notes == ["LearningRateMonitor: metrics.jsonl has lr in every line"]
    assert new(callbacks=named) == {
        "checkpoint.keep_best": "val_loss",
        "checkpoint.keep_best_mode": "max",
        "checkpoint.every_epochs": 1,
    }
    assert new(callbacks=best) == {"checkpoint.every_epochs": 2}
    everything = theirs.ModelCheckpoint(save_top_k=-1, train_time_interval=timedelta(minutes=5))
    assert new(callbacks=everything) == {
        "checkpoint.every_epochs": 0,
        "checkpoint.every_minutes": 5.0,
        "checkpoint.keep_last": KEEP_ALL,
    }
    several = theirs.ModelCheckpoint(monitor="val_loss", save_top_k=3)
    assert new(callbacks=several)["checkpoint.keep_best_count"] == 3
    assert new(callbacks=theirs.ModelCheckpoint(save_top_k=0)) == {
        "checkpoint.every_epochs": 0,
        "checkpoint.keep_last": 1,
    }
    assert new(callbacks=theirs.EarlyStopping("val_loss", min_delta=0.1, patience=5)) == {
        "early_stopping.monitor": "val_loss",
        "early_stopping.mode": "min",
        "early_stopping.patience": 5,
        "early_stopping.min_delta": 0.1,
        "early_stopping.check_finite": True,
    }
    assert new(callbacks=theirs.TQDMProgressBar(refresh_rate=0)) == {"logging.progress": "none"}
    assert new(callbacks=theirs.Timer("00:00:10:00")) == {"run.max_seconds": 600.0}
    assert new(callbacks=theirs.GradientAccumulationScheduler({0: 1})) == {}


@pytest.mark.parametrize(
    ("callback", "way_out"),
    [
        (Watching(), "on_train_end would never be called"),
        (theirs.StochasticWeightAveraging(swa_lrs=0.1), "training.ema_decay"),
        (theirs.EarlyStopping("loss", check_on_train_epoch_end=True), "after every epoch"),
        (theirs.EMAWeightAveraging(), "training.ema_decay"),
        (theirs.GradientAccumulationScheduler({0: 2}), "accumulate_grad_batches"),
        ([Named(), theirs.ModelCheckpoint(monitor="other")], "two callbacks"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_callbacks_that_cannot_be_had(callback: Any, way_out: str) -> None:
    with pytest.raises(ConfigError, match=way_out):
        of(callbacks=callback)


class Handed(Logger):
    """One of the user's, or of a service."""

    name, version = "handed", 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *arguments: Any, **more: Any) -> None: ...


def test_loggers() -> None:
    handed = Handed()
    found = of(logger=[handed, CSVLogger("logs", name="mine", version="v7")])
    assert found.loggers == [handed]
    assert found.keys["run.directory"] == "logs/mine"
    assert found.keys["run.name"] == "v7"
    assert "run.name" not in of(logger=CSVLogger("logs")).keys
