"""What TrainingArguments must leave to the controller."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from distgrow.core.errors import ConfigError
from distgrow.growth.controller import Controller

#: Arguments that have to keep their defaults, and what each would do otherwise.
_DECIDED: dict[str, str] = {
    "gradient_accumulation_steps": "is fixed for a run, while the controller's accumulation follows the batch",
    "max_steps": "would end the run elsewhere than the controller's budget",
    "num_train_epochs": "would end the run elsewhere than the controller's budget",
    "lr_scheduler_type": "would fight the controller's lr; say it there as lr.decay",
    "lr_scheduler_kwargs": "would fight the controller's lr; say it there as lr.decay",
    "warmup_steps": "would fight the controller's lr; say it there as lr.decay with a warm-up",
    "warmup_ratio": "would fight the controller's lr; say it there as lr.decay with a warm-up",
    "auto_find_batch_size": "would train on smaller batches than the controller's; set its max_micro",
    "dataloader_drop_last": "would leave samples out",
    "group_by_length": "would order samples otherwise than distgrow, which draws each once per epoch",
    "train_sampling_strategy": "would order samples otherwise than distgrow, which draws each once per epoch",
    "include_num_input_tokens_seen": "counts the tokens of a fixed batch; the ledger counts samples",
    "restore_callback_states_from_checkpoint": "would make a second callback in growth's place",
}
#: Arguments that have to be off.
_OFF: dict[str, str] = {
    "fp16": "scales losses and skips steps by itself; use bf16",
    "deepspeed": "shards gradients and divides by its own accumulation; use distgrow's engine.kind=deepspeed",
    "fsdp": "shards gradients, so an update that is not finite cannot be told on every rank; use DDP",
    "parallelism_config": "gives several ranks the same rows; use DDP",
}


def check_arguments(args: TrainingArguments, controller: Controller, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError with all that TrainingArguments decide otherwise than the controller, one a line."""
    found = list(_problems(args, controller, settings))
    if found:
        raise ConfigError("\n".join(found))


def _problems(args: TrainingArguments, controller: Controller, settings: Mapping[str, Any]) -> Iterator[str]:
    defaults = {field.name: field.default for field in fields(args)}
    for name, why in _DECIDED.items():
        if name in defaults and getattr(args, name) != defaults[name]:
            yield f"{name}={getattr(args, name)} {why}; leave {name} out"
    for name, why in _OFF.items():
        if getattr(args, name, None):
            yield f"{name}={getattr(args, name)!r} {why}"
    shared = {"learning_rate": ("lr.base", controller.lr.initial)}
    shared["per_device_train_batch_size"] = ("max_micro", controller.max_micro)
    for name, (ours, value) in shared.items():
        if getattr(args, name) not in (defaults[name], value):
            yield f"{name}={getattr(args, name)!r}, but the controller's {ours} is {value!r}; leave {name} out"
    config: Any = args.accelerator_config
    if config.split_batches or config.dispatch_batches:
        yield "accelerator_config.split_batches and dispatch_batches hand out the batches of one rank; leave them out"
    if args.n_gpu > 1:
        yield f"one process would drive {args.n_gpu} GPUs (DataParallel), which cuts micro-batches up; use torchrun"
    if (settings.get("optimizers") or (None, None))[1] is not None:
        yield "optimizers has a learning-rate scheduler, which would fight the controller's lr; give (optimizer, None)"
