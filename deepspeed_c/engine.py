"""DeepSpeedEngine: the nn.Module that a script trains through.

It runs the module, autograd and the caller's objects; every number between gradient and new parameter is
the core's. Configuration accessors (``fp16_enabled()`` and so on) are in settings.py.
"""
import logging
import os
import weakref
from contextlib import contextmanager, nullcontext, suppress

import torch

from . import _core, optimizer_choice
from . import model as model_setup
from .checkpoint.save import EngineCheckpoints
from .distributed import engine_comm
from .mpu import mpu_layout
from .offload_states import EVERYTHING, GRADIENTS, PARAMETERS, EngineOffload
from .optimizer import CoreOptimizer, DeepSpeedOptimizer, DestroyedEngine
from .optimizer_run import CoreRun, ForeignRun
from .reduction import Reduction, prepare_experts
from .replaced import Places
from .report import StepReport
from .runtime import lr_schedules
from .settings import EngineSettings
from .utils import groups as rank_groups
from .utils.logging import log_dist, logger, set_log_level_from_string
from .utils.tensor_fragment import claim, release
from .weights import EngineWeights
from .whole import whole


def _local_rank(args):
    """This process's rank on its machine: args.local_rank, args.device_rank or LOCAL_RANK; 0 without any."""
    env = os.environ.get("LOCAL_RANK")
    for name in ("local_rank", "device_rank"):
        given = getattr(args, name, None)
        if given is None or given == -1:
            continue
        if not isinstance(given, int):
            raise TypeError(f"args.{name} is {given!r}, allowed: an integer")
        if env is not None and int(env) != given:
            raise ValueError(f"args.{name} is {given} and LOCAL_RANK is {env}; they must be equal")
        return given
    return int(env) if env is not None else 0


_SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def _autocast_of(config):
    """The dtype that torch.autocast casts to around forward, None where it is off."""
    if not config.get("torch_autocast.enabled"):
        return None
    return getattr(torch, config.get("torch_autocast.dtype").removeprefix("torch."))


def _cast_inputs(value, dtype):
    """`value` with the floating tensors in it, also inside lists, tuples and dicts, as dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return type(value)((key, _cast_inputs(item, dtype)) for key, item in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cast_inputs(item, dtype) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_cast_inputs(item, dtype) for item in value)
    return value


# The hook of each parameter that an early engine trains, by id: a parameter itself must stay picklable.
_HOOKS = {}


def _remove_hooks(handles):
    for key, handle in handles.items():
        handle.remove()
        if _HOOKS.get(key) is handle:
            del _HOOKS[key]
    handles.clear()


class DeepSpeedEngine(EngineSettings, EngineWeights, EngineOffload, EngineCheckpoints, torch.nn.Module):
    """Made by deepspeed_c.initialize.

    Attributes: module (the caller's own object), optimizer, lr_scheduler, training_dataloader, config (the
    dict that was given), global_steps, global_samples, micro_steps, skipped_steps, local_rank, global_rank,
    world_size, dp_world_size, mp_world_size, mpu, device. Attributes that the engine has not are looked up in the
    module.
    """

    def __init__(self, args=None, model=None, optimizer=None, model_parameters=None, training_data=None,
                 lr_scheduler=None, collate_fn=None, config=None, mpu=None):
        super().__init__()
        self._comm = engine_comm()
        self.world_size = self._comm.size
        self.global_rank = self._comm.rank
        self._layout = mpu_layout(mpu)
        self.mpu = mpu
        if mpu is not None:
            rank_groups.mpu = mpu
        self.dp_world_size, self.mp_world_size = self._layout.n_data, self._layout.tensor_size
        self.local_rank = _local_rank(args)
        self._config = _core.Config(config, self.dp_world_size, None if mpu is None else self._layout.sizes)
        self.config = self._config.source
        if self.log_level() is not None:
            set_log_level_from_string(self.log_level())
        self._sizes = [self._config.get(key) for key in _SIZES]
        self._managed = self._config.get("managed_gradient_accumulation")
        self._autocast = _autocast_of(self._config)
        self._casts_inputs = self._config.get("fp16.auto_cast") and self._config.get("fp16.enabled")
        self._scales = self._config.get("fp16.enabled") or self._autocast is torch.float16
        for line in self._config.warnings if self.global_rank == 0 else ():
            logger.warning("configuration: %s", line)
        if self._config.get("zero_optimization.overlap_comm") and self._comm.backend not in ("self", "shm"):
            log_dist(f"zero_optimization.overlap_comm has no effect over {self._comm.backend}: gradients travel at the "
                     "end of a backward pass (stage 2) or at the boundary", ranks=[0], level=logging.WARNING)
        self.device = torch.device("cpu")
        self.global_steps = self.global_samples = self.micro_steps = self.skipped_steps = 0
        self._micro_origin = 0  # the micro-step from which boundaries are counted
        self._boundary_override = None
        self._inside_no_sync = self._coalescing = False
        self._last_step_skipped = self._step_applied = self._said_changed = False
        self._scaled = False  # since the last step, a loss was scaled by backward() or scale()
        self._grad_norm = None
        self._handles = {}
        self._finalizer = weakref.finalize(self, _remove_hooks, self._handles)
        self._places = {}
        self._where = None
        self.optimizer = self.basic_optimizer = self._run = self._core = self._shards = self._reduction = None
        self.module = model
        self.lr_scheduler = self.training_dataloader = None
        try:
            # A mistake in an argument is found here, before the module is changed.
            parameters = self._prepare_optimizer(optimizer, model_parameters)
            if training_data is not None:
                self.training_dataloader = self.deepspeed_io(training_data, collate_fn=collate_fn)
            self.lr_scheduler = self._make_scheduler(lr_scheduler)
            self._take_module(parameters)
            self._install_hooks()  # last: until here an earlier engine over the same parameters keeps its own
            if self._shards is not None:
                self._shards.started()
        except BaseException:
            with suppress(_core.CommError):  # the first error says more
                self.destroy()
            raise
        self._report = StepReport(self)
        log_dist(f"DeepSpeed info: version=deepspeed_c, world_size={self.world_size}, "
                 f"stage={self.zero_optimization_stage()}", ranks=[0])

    # ---- construction ----

    def _choose_optimizer(self, optimizer, model_parameters):
        """The caller's optimizer, the configuration's, or None."""
        self._made_optimizer = optimizer is None
        name = self._config.get("optimizer.type")
        if optimizer is not None:
            if name is not None:
                log_dist(f"initialize(optimizer=...) wins over optimizer.type {name!r} of the configuration", ranks=[0])
            source = self.module.parameters() if model_parameters is None else model_parameters
            optimizer = optimizer_choice.given(optimizer, list(source))
            model_setup.check_once(self.module, optimizer.param_groups, "optimizer.param_groups")
            return optimizer
        if name is None:
            if self.zero_optimization_stage() in (1, 2):
                raise ValueError(f"zero_optimization.stage is {self.zero_optimization_stage()} and there is no "
                                 "optimizer; allowed without one: stages 0 and 3")
            return None
        groups = model_setup.make_groups(self.module, model_parameters)
        model_setup.check_once(self.module, groups, "model_parameters")
        return optimizer_choice.by_name(name, self._config.subtree("optimizer.params") or {}, groups)

    def _prepare_optimizer(self, optimizer, model_parameters):
        """Makes the optimizer and checks it; returns the Parameters that it trains, None without one."""
        optimizer = self._choose_optimizer(optimizer, model_parameters)
        parameters = None
        if optimizer is not None:
            self._rule = optimizer_choice.kind_of(optimizer, self.zero_optimization_stage(),
                                                  self._config.get("zero_allow_untested_optimizer"))
            parameters = model_setup.Parameters(self.module, optimizer.param_groups)
            if not parameters.tensors:
                raise ValueError("there is nothing to train: no parameter of the optimizer requires a gradient")
            self.basic_optimizer = optimizer
            self.optimizer = DeepSpeedOptimizer(self, optimizer)
        self._params = parameters.tensors if parameters else []
        if self.zero_optimization_stage() < 3:
            model_setup.check_whole(self.module, self._params)
        self._frozen = self._frozen_now()
        model_setup.check_storages(self.module, self._params)
        return parameters

    def _frozen_now(self):
        """{name: Parameter} of what is not trained and requires no gradient."""
        trained = {id(p) for p in self._params}
        return {name: p for name, p in self.module.named_parameters()
                if not p.requires_grad and id(p) not in trained}

    def _take_module(self, parameters):
        """Gives the module its dtype and rank 0's values, and opens the core over what is trained."""
        dtype = torch.float16 if self.fp16_enabled() else torch.bfloat16 if self.bfloat16_enabled() else None
        prepare_experts(self.module, self._config.get("use_data_before_expert_parallelism"), self.mp_world_size)
        everything = model_setup.every(self.module, self._params)
        reduction = self._reduction = Reduction(self._layout, everything)
        model_setup.cast(self.module, dtype)
        if self.zero_optimization_stage() == 3:
            self._shard(everything, reduction, dtype, parameters)
        else:
            model_setup.lay_out(everything.values())
            model_setup.broadcast(reduction, everything.values())
        _core.give_back_freed()  # what the cast and the move left: up to 4 bytes an element
        if parameters is None:
            self.optimizer = self._shards
            return
        self._comms = [reduction.comms[reduction.index(p)] for p in self._params]
        kind, whole = self._rule
        self._names = parameters.names
        self._core = model_setup.open_core(reduction, self._config, parameters, kind, whole)
        if self._shards is not None:
            self._shards.bind(self._core, parameters)
        self._core.load_masters()
        self._run = (ForeignRun if kind == "foreign" else CoreRun)(self.basic_optimizer, self, parameters, kind)
        if isinstance(self.basic_optimizer, CoreOptimizer):
            self.basic_optimizer.bind(self)

    def _shard(self, everything, reduction, dtype, parameters):
        """The module's parameters under ZeRO stage 3."""
        from .runtime.zero.shards import Shards  # who has no stage 3 starts quicker without

        self._shards = Shards(self.module, everything, reduction, dtype, self._config)
        if parameters is not None:
            parameters.fulls = [whole(p) for p in parameters.tensors]

    def _install_hooks(self):
        if self._core is not None:
            self._where = Places(self.module, self._params, self._names)
        self._places = claim(self, self._params)
        weakref.finalize(self, release, self._places)
        for i, p in enumerate(self._params):
            self._hook(i, p)

    def _hook(self, i, earlier):
        """Parameter i's gradients go to this engine alone, and those of `earlier` (often the same) to none."""
        p = self._params[i]
        for other in (earlier, p):
            handle = _HOOKS.pop(id(other), None)
            self._handles.pop(id(other), None)
            if handle is not None:
                handle.remove()
        if self._core.early:
            _HOOKS[id(p)] = p.register_post_accumulate_grad_hook(self._core.hook(i))
            self._handles[id(p)] = _HOOKS[id(p)]

    def _make_scheduler(self, given):
        if given is not None:
            if hasattr(given, "step") and not isinstance(given, type):
                return given
            if not callable(given):
                raise TypeError(f"lr_scheduler is {type(given).__name__}; allowed: an object with step(), or a "
                                "callable that makes one from an optimizer")
            if self.basic_optimizer is None:
                raise ValueError("lr_scheduler is a callable and there is no optimizer to call it with")
            return given(self.basic_optimizer)
        name = self._config.get("scheduler.type")
        if name is None or self.optimizer is None:
            return None
        return lr_schedules.create(name, self.optimizer, self._config.subtree("scheduler.params"))

    def deepspeed_io(self, dataset, batch_size=None, route="train", pin_memory=True, data_sampler=None,
                     collate_fn=None, num_local_io_workers=None):
        """A torch DataLoader over this rank's part of dataset.

        The order is a counter-based function of (seed, epoch, index); each iteration is a new epoch.
        route: "train" shuffles, "eval" and "predict" do not. num_local_io_workers: None takes
        ``dataloader_num_workers`` of the configuration.
        """
        from .dataloader import make_loader
        workers = self._config.get("dataloader_num_workers") if num_local_io_workers is None else num_local_io_workers
        return make_loader(dataset, batch_size or self.train_micro_batch_size_per_gpu(), self._layout.data_rank,
                           self.dp_world_size, self._config.get("seed"), collate_fn,
                           self._config.get("dataloader_drop_last"), workers, data_sampler, route == "train")

    # ---- a step ----

    def forward(self, *args, **kwargs):
        self._refuse_offloaded("forward", PARAMETERS)
        with self._report.timed("forward"):
            if self._casts_inputs:
                args, kwargs = _cast_inputs(args, torch.float16), _cast_inputs(kwargs, torch.float16)
            if self._autocast is None:
                return self.module(*args, **kwargs)
            with torch.autocast(self.device.type, self._autocast):
                return self.module(*args, **kwargs)

    def backward(self, loss, retain_graph=False, scale_wrt_gas=True):
        """Runs autograd from `loss`, scaled by the loss scale and, with scale_wrt_gas, divided by
        gradient_accumulation_steps. loss: a tensor of one element. Returns the loss so divided."""
        core = self._needs_core("backward")
        self._refuse_offloaded("backward", PARAMETERS | GRADIENTS)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(f"backward needs a loss of one element, got {got}")
        if not loss.requires_grad:
            raise ValueError("backward needs a loss that depends on parameters that require a gradient; got one "
                             "without grad_fn")
        self._take_replaced()
        self._refuse_unfrozen()
        divisor = self.gradient_accumulation_steps() if scale_wrt_gas and self._managed else 1
        factor = core.scale / divisor
        self._scaled = True
        boundary = self.is_gradient_accumulation_boundary()
        with self._report.timed("backward"):
            core.begin_backward(boundary)
            with self._report.timed("backward_inner"), self._fetching():
                loss.backward(None if factor == 1.0 else torch.full_like(loss, factor), retain_graph=retain_graph)
            core.end_backward(boundary)
        return loss if divisor == 1 else loss / divisor

    def _fetching(self):
        """A context around a backward pass in which sharded parameters are whole."""
        return nullcontext() if self._shards is None else self._shards.backward()

    def _refuse_unfrozen(self):
        """A parameter that was frozen at initialize has no place in the core: training it would do nothing."""
        if any(p.requires_grad for p in self._frozen.values()):
            names = [name for name, p in self._frozen.items() if p.requires_grad]
            raise ValueError(f"parameter {names[0]} requires a gradient now and did not at initialize, so the engine "
                             f"does not train it ({len(names)} such parameters); let it require one before "
                             "initialize and freeze it afterwards, or call initialize again")

    def scale(self, loss):
        """The loss times the loss scale, for a ``.backward()`` of one's own before step()."""
        scale = self._needs_core("scale").scale
        self._scaled = True
        return loss * scale

    def is_gradient_accumulation_boundary(self):
        """Whether the current micro-step ends with an optimizer step."""
        if self._inside_no_sync:
            return False
        if self._boundary_override is not None:
            return self._boundary_override
        return not self._managed or (self.micro_steps - self._micro_origin + 1) % self._sizes[2] == 0

    def set_gradient_accumulation_boundary(self, is_boundary):
        """Decides is_gradient_accumulation_boundary() from now on, instead of counting."""
        self._boundary_override = bool(is_boundary)

    @contextmanager
    def no_sync(self):
        """Backward passes inside only accumulate; step() is not allowed. ZeRO 0 and 1 only."""
        if self.zero_optimization_stage() >= 2:
            raise RuntimeError(f"no_sync is not possible with ZeRO stage {self.zero_optimization_stage()}: gradients "
                               "are reduced in every backward; allowed: 0, 1")
        if self._inside_no_sync:
            raise RuntimeError("no_sync: already inside no_sync")
        self._inside_no_sync = True
        try:
            yield
        finally:
            self._inside_no_sync = False

    @contextmanager
    def coalesce_grad_reduction(self):
        """Backward passes inside add up on this rank only; what they gave is reduced once, at the end of the block
        (stage 2, or else at the boundary). step() is not allowed inside."""
        core = self._needs_core("coalesce_grad_reduction")
        if self._coalescing or self._inside_no_sync:
            raise RuntimeError("coalesce_grad_reduction: already inside "
                               f"{'coalesce_grad_reduction' if self._coalescing else 'no_sync'}")
        core.begin_deferring()
        self._coalescing = True
        try:
            yield
        finally:
            self._coalescing = False
            core.end_deferring()

    def step(self, lr_kwargs=None):
        """At a boundary: optimizer step, then schedule, unless the step was skipped. Elsewhere it only counts the
        micro-step. lr_kwargs: keywords of the schedule's step(), such as {"metrics": loss}."""
        self._needs_core("step")
        if self._inside_no_sync or self._coalescing:
            raise RuntimeError(f"step() inside {'no_sync' if self._inside_no_sync else 'coalesce_grad_reduction'}(): "
                               "leave the context first")
        self._step_applied = False
        boundary = self.is_gradient_accumulation_boundary()
        with self._report.timed("step"):
            if boundary:
                self._apply_gradients()
                if self.lr_scheduler is not None and not self._last_step_skipped:
                    lr_schedules.advance(self.lr_scheduler, lr_kwargs, self.train_batch_size())
        self.micro_steps += 1
        self._report.after_step(boundary)

    def _apply_gradients(self):
        """The boundary in the core, then counters and what has to be said about it."""
        core = self._needs_core("step")
        try:
            self._refuse_offloaded("step", EVERYTHING)
            self._let_change()
            self._take_replaced()
            self._refuse_unscaled()
            if self._shards is not None:
                self._shards.before_step()
            self.optimizer.run_hooks("pre")
            self._run.prepare()
        except BaseException:
            core.refuse_step()  # the other ranks wait in this step, and would take the next one for it
            raise
        try:
            report = self._run.step()
        except BaseException:
            if self._shards is not None:
                self._shards.note_step()
            raise
        if self._shards is not None:
            self._shards.after_step()
        self.optimizer.run_hooks("post")
        self._report.after_boundary(report)
        self._scaled = False
        self.global_steps += 1
        self.global_samples += self.train_batch_size()
        self._grad_norm = report["norm"]
        self._last_step_skipped = not report["stepped"]
        self._step_applied = report["stepped"]
        # What torch's schedules look for, to warn about a schedule that steps first.
        self.optimizer._opt_called = self.basic_optimizer._opt_called = True
        self.skipped_steps += self._last_step_skipped
        if report["nonfinite"]:
            self._say_nonfinite(report)
        if report["n_changed"] and not self._said_changed:
            self._said_changed = True
            logger.warning("[Rank %d] step %d: %d parameters were changed outside the engine since the last step "
                           "(first: %s); their new values are used. This is said once.", self.global_rank,
                           self.global_steps, report["n_changed"], self._names[report["changed_param"]])

    def _refuse_unscaled(self):
        scale = self._core.scale
        if scale != 1.0 and not self._scaled and any(p.grad is not None for p in self._params):
            raise RuntimeError(f"Loss scaling is required: the loss scale is {scale:g} and gradients come from a "
                               "plain loss.backward(); use engine.backward(loss), or engine.scale(loss).backward()")

    def _take_replaced(self):
        """Parameters that were assigned over trained ones since the last look take their places in everything."""
        if self._where is None or not self._where.changed():
            return
        self._let_change()
        taken = self._where.take_over()
        if self._shards is not None:
            self._shards.replace(taken)
        self._run.replace(taken)
        self._frozen = self._frozen_now()
        for i, old, _ in taken:
            self._hook(i, old)
        release(self._places)
        self._places.update(claim(self, self._params))

    def _say_nonfinite(self, report):
        # Rank 0 says it, unless the place is in a part of the model that it has not: then the rank itself.
        bad, known = report["bad_rank"], self._layout.data_ranks
        if self.global_rank != (0 if bad < 0 or 0 in known else bad) or bad >= 0 and bad not in known:
            return
        where = "every rank's gradients are finite; their sum is not"
        if report["bad_rank"] >= 0:
            where = (f"it began in {self._names[report['bad_param']]}, element {report['bad_elem']}, on rank "
                     f"{report['bad_rank']}, in backward pass {report['bad_micro']} of the step")
        what = "skipped: non-finite gradient" if self._last_step_skipped else "used a non-finite gradient"
        scale = ""
        if self._scales:
            scale = f"; loss scale {report['scale']:g}, next {report['next_scale']:g}"
        logger.warning("step %d %s; %s%s (%d skipped so far)", self.global_steps, what, where, scale,
                       self.skipped_steps)

    def get_wall_clock_timers(self):
        """{name: milliseconds} of the last step's timers; empty without wall_clock_breakdown."""
        return self._report.snapshot()

    def was_step_applied(self):
        """Whether the last step() changed parameters: False off a boundary and for a skipped step."""
        return self._step_applied

    def zero_grad(self, set_to_none=True):
        """Drops the gradients of the module's parameters, and what this rank has added up of them over micro-steps.
        At stage 2, and with overlap_comm, what earlier backward passes reduced stays, as in DeepSpeed."""
        for p in (*self.module.parameters(), *self._params):
            p.grad = None
        if self._core is not None:
            self._core.drop_sums()

    # ---- reading ----

    def get_global_grad_norm(self):
        """2-norm of the last step's averaged, unscaled gradients before clipping; None before the first step."""
        return self._grad_norm

    def get_lr(self):
        """One learning rate per parameter group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_mom(self):
        """One momentum (SGD) or pair of betas (Adam) per parameter group."""
        return [group["betas"] if "betas" in group else float(group.get("momentum", 0.0))
                for group in self.optimizer.param_groups]

    def get_type(self):
        """One entry per parameter group: its "type" key, or None."""
        return [group.get("type") for group in self.optimizer.param_groups]

    def get_batch_info(self):
        """(train_batch_size, micro batch size per rank, gradient_accumulation_steps) as numbers."""
        return tuple(self._sizes)

    def train_batch_size(self):
        """Samples per optimizer step on all ranks."""
        return self._sizes[0]

    def train_micro_batch_size_per_gpu(self):
        """Samples per forward pass on one rank."""
        return self._sizes[1]

    def gradient_accumulation_steps(self):
        """Micro-steps per optimizer step."""
        return self._sizes[2]

    def set_train_batch_size(self, train_batch_size):
        """Changes the samples per optimizer step by changing gradient_accumulation_steps. Between steps only; the
        same on all ranks."""
        share = self._sizes[1] * self.dp_world_size
        if not isinstance(train_batch_size, int) or train_batch_size < 1 or train_batch_size % share:
            raise ValueError(f"Train batch size must be divisible by micro-batch data parallelism: train_batch_size is "
                             f"{train_batch_size!r}; allowed: multiples of {share} (micro batch {self._sizes[1]} * "
                             f"{self.dp_world_size} ranks)")
        self._change_sizes(self._sizes[1], train_batch_size // share)

    def set_train_micro_batch_size(self, micro_batch_size):
        """Changes the samples per forward pass, and with it train_batch_size; gradient_accumulation_steps stays.
        A loader that exists keeps its batches. Between steps only; the same on all ranks."""
        if not isinstance(micro_batch_size, int) or micro_batch_size < 1:
            raise ValueError(f"micro_batch_size is {micro_batch_size!r}; allowed: an integer >= 1")
        self._change_sizes(micro_batch_size, self._sizes[2])

    def _change_sizes(self, micro, accumulation):
        done = (self.micro_steps - self._micro_origin) % self._sizes[2]
        if done:
            raise RuntimeError(f"batch sizes can change between optimizer steps only; {done} of {self._sizes[2]} "
                               "micro-steps are done")
        self._sizes = [micro * accumulation * self.dp_world_size, micro, accumulation]
        self._micro_origin = self.micro_steps

    def optimizer_name(self):
        """``optimizer.type`` of the configuration, or None."""
        return self._config.get("optimizer.type")

    def scheduler_name(self):
        """``scheduler.type`` of the configuration, or None."""
        return self._config.get("scheduler.type")

    def torch_autocast_dtype(self):
        """The dtype that torch.autocast casts to around forward; None where it is off."""
        return self._autocast

    def dynamic_loss_scale(self):
        """Whether the loss scale changes by itself."""
        return bool(self._scales and self._config.get("fp16.loss_scale") == 0)

    def loss_scale(self):
        """The loss scale of the next backward pass; 1.0 unless fp16."""
        return self._core.scale if self._core is not None else 1.0

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None or not hasattr(module, name):
                raise AttributeError(f"neither DeepSpeedEngine nor its module has an attribute {name!r}") from None
            return getattr(module, name)

    # ---- the end ----

    def _needs_core(self, method):
        if self._core is None:
            raise RuntimeError(f"engine.{method}() needs an optimizer, and the engine has none (or was destroyed)")
        return self._core

    def destroy(self):
        """Frees masters, optimizer states and shared memory, and takes the hooks off. The module stays usable,
        its parameters in ordinary private storage. Idempotent. At stage 3 where ranks share no memory it is collective:
        CommError, with everything freed, where ranks are gone whose parts would be needed. Collective too where a
        checkpoint is being written (checkpoint.async): waits for it, and raises what it met with, with everything
        freed."""
        try:
            self.checkpoint_commit()
        finally:
            self._free()

    def _free(self):
        self._finalizer()
        release(self._places)
        if self._run is not None:
            self._run.release()
        if self._core is not None:
            self._core.close()
            self._core = None
        if isinstance(self.optimizer, DeepSpeedOptimizer):
            self.optimizer._engine = DestroyedEngine(self)  # a cycle would keep the module until a collection
        if self._shards is not None:
            self._shards.release()
