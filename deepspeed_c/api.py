"""initialize, add_config_arguments: what a script calls first."""
import argparse

import torch

from . import foreign
from .distributed import init_distributed
from .engine import DeepSpeedEngine
from .utils.logging import logger


def initialize(args=None, model=None, optimizer=None, model_parameters=None, training_data=None, lr_scheduler=None,
               distributed_port=29500, mpu=None, dist_init_required=None, collate_fn=None, config=None,
               mesh_param=None, config_params=None):
    """Wraps a module in an engine. Collective: every rank calls it, with the same model and settings.

    args: a namespace; its ``deepspeed_config`` (a path) serves where no config is given, its ``local_rank``
        (or ``device_rank``) must agree with LOCAL_RANK where both are set.
    model: the nn.Module to train; it is changed in place (dtype, values of rank 0).
    optimizer: a torch.optim.Optimizer over the model's parameters, or a callable that makes one from a list of them;
        wins over the configuration's. Adam, AdamW, SGD, Adagrad and those of deepspeed_c.ops run in C, others by torch.
    model_parameters: None (all), an iterable of parameters, or of group dicts with their own lr and so on.
    training_data: a torch Dataset, for a loader that gives this rank its part, ``collate_fn`` as torch's.
    lr_scheduler: a scheduler object, or a callable that makes one from an optimizer; wins over the
        configuration's.
    mpu: a Megatron-style object that says which ranks are parallel over data, tensors and stages: ZeRO shards over the
        data-parallel ones (with those that share a sequence), and all agree on norm, clipping and skipping.
    config, config_params: dict, path of a JSON file, JSON text, or base64 of it.

    Returns (engine, optimizer, training loader or None, scheduler or None).
    Raises DeepSpeedConfigError (a ValueError) for the configuration, ValueError and TypeError for other
    arguments, CommError where ranks diverge or die, NotImplementedError for what is not there yet.
    """
    foreign.refuse()
    if model is None:
        raise ValueError("deepspeed.initialize requires a model; got model=None")
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is {type(model).__name__}; allowed: a torch.nn.Module")
    if config is None:
        config = config_params
    path = getattr(args, "deepspeed_config", None)
    if path is None and getattr(args, "deepscale_config", None) is not None:
        logger.warning("--deepscale_config is deprecated; use --deepspeed_config")
        path = args.deepscale_config
    if config is None and path is None:
        raise ValueError("no configuration: pass config=..., or --deepspeed_config PATH in args")
    if config is not None and path is not None:
        raise ValueError(f"two configurations: config=... and args.deepspeed_config={path!r}; pass one of them")
    if mesh_param is not None:
        raise NotImplementedError("initialize(mesh_param=...): not yet; sequence parallelism is not there")
    if mpu is not None and not hasattr(mpu, "get_data_parallel_group"):
        raise TypeError(f"mpu is {type(mpu).__name__}; allowed: an object with get_data_parallel_group() and its kin, "
                        "such as utils.parallel_state_deepspeed.initialize_parallel_state_from_config makes")
    init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    engine = DeepSpeedEngine(args=args, model=model, optimizer=optimizer, model_parameters=model_parameters,
                             training_data=training_data, lr_scheduler=lr_scheduler, collate_fn=collate_fn,
                             config=path if config is None else config, mpu=mpu)
    if engine._config.get("comms_logger.enabled"):
        from .comm import configure  # not needed by others, and they start quicker without

        configure(engine._config)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def add_config_arguments(parser):
    """Adds --deepspeed, --deepspeed_config and their old spellings to an argparse parser; returns it."""
    group = parser.add_argument_group("DeepSpeed", "DeepSpeed configurations")
    group.add_argument("--deepspeed", default=False, action="store_true",
                       help="train with DeepSpeed (a flag for the script itself)")
    group.add_argument("--deepspeed_config", default=None, type=str, help="path of the JSON configuration")
    group.add_argument("--deepscale", default=False, action="store_true", help=argparse.SUPPRESS)
    group.add_argument("--deepscale_config", default=None, type=str, help=argparse.SUPPRESS)
    return parser


def init_inference(model, config=None, **kwargs):
    """Not there yet."""
    raise NotImplementedError("init_inference: inference is not yet")


def tp_model_init(model, tp_size, dtype, config=None, **kwargs):
    """Not there yet."""
    raise NotImplementedError("tp_model_init: tensor parallelism is not yet")
