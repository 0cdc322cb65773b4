"""Writes what an engine has in DeepSpeed's own layout, so that DeepSpeed, and what reads its files, can go on with it.

Decides what each rank's files hold. Invariant: every rank's files are its own; what may fail on one rank alone fails
before ranks exchange anything, or after.
"""
import base64
import json
import os
import threading
from collections import OrderedDict

import torch

from ..runtime.zero.parameter import is_zero
from . import deepspeed_files as files
from .agree import broadcast_bytes, gather_json, together
from .contents import Contents, buffers_of
from .deepspeed_exchange import Exchange, in_logical_order
from .deepspeed_layout import part_of_parameter, spans_of_subgroup
from .deepspeed_meaning import OWN_KEY
from .deepspeed_optimizer import LAYOUT_OF, OptimizerStates
from .save import Saving
from .utils import clone_tensors_for_torch_save

_CALL = "save_checkpoint"


def save(engine, aside, client_state, save_latest, exclude_frozen):
    """Saves into an Aside. Collective. Returns the Saving that is under way where checkpoint.async is set, else None.
    """
    comm = engine._comm

    def agreed(step):
        problem = result = None
        try:
            result = step()
        except Exception as error:
            problem = error
        together(comm, problem, _CALL)
        return result

    if len(aside.ranks) < comm.size:
        raise NotImplementedError("checkpoint.use_node_local_storage over several nodes is not yet in DeepSpeed's "
                                  'layout; checkpoint.format "native" has it')
    writer = agreed(lambda: DeepSpeedWriter(engine, Contents(engine, None, exclude_frozen), client_state,
                                            exclude_frozen))
    writer.share()
    agreed(writer.check)
    writer.collect()

    def complete():
        aside.publish(save_latest)

    if engine._config.get("checkpoint.async"):
        behind = agreed(lambda: _Behind(writer.files(clone_tensors_for_torch_save), aside.path))
        names = gather_json(comm, behind.names, _CALL)
        return Saving(aside, behind, [name for own in names or () for name in own], complete)
    agreed(lambda: _dump_all(writer.files(), aside.path))
    agreed(complete if aside.leads else lambda: None)
    return None


def _dump_all(named, folder):
    """Each file gets its name when it is whole."""
    for name, value in named.items():
        path = os.path.join(folder, name)
        files.dump(value, f"{path}.part")
        os.replace(f"{path}.part", path)


class _Behind:
    """Writes files in a thread; wait() raises what went wrong. named: {name: value}, which nobody else changes."""

    def __init__(self, named, folder):
        self.names, self._failure = list(named), None
        self._thread = threading.Thread(target=self._run, args=(named, folder), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, named, folder):
        try:
            _dump_all(named, folder)
        except Exception as error:
            self._failure = error

    def done(self):
        return not self._thread.is_alive()

    def wait(self):
        self._thread.join()
        if self._failure is not None:
            raise self._failure


class DeepSpeedWriter:
    """One checkpoint of `engine`, whose Contents are given. client_state: the caller's. exclude_frozen: without
    parameters that are not trained. NotImplementedError for experts at stage 3."""

    def __init__(self, engine, contents, client_state=None, exclude_frozen=False):
        self._engine, self._contents = engine, contents
        self._client_state, self._exclude_frozen = dict(client_state or {}), exclude_frozen
        self._stage, self._comm = engine.zero_optimization_stage(), engine._reduction.comms[0]
        layout = engine._layout
        self._number = layout.tensor_rank + layout.tensor_size * layout.pipe_rank
        self._parts = {(part.tensor.kind, part.tensor.name): part for part in contents.parts}
        self._comm_of = {contents.names.of_parameter(name, p)[0]: contents.names.of_parameter(name, p)[2]
                         for name, p in contents.names.parameters.items()}
        self._layers = contents.names.expert_layers
        if self._layers and self._stage == 3:
            raise NotImplementedError("experts at stage 3 are not known to DeepSpeed's layout; checkpoint.format "
                                      "\"native\" has them")
        self._states = self._optimizer = self._shapes = self._frozen = self._own = None

    # ---- what all ranks do together ----

    def share(self):
        """Ranks tell each other what they have. Collective."""
        slots, scalars = self._share()
        self._ranges = self._all_ranges()
        if self._engine._run is not None:
            self._states = OptimizerStates(self._engine, self._contents, self._ranges, slots, scalars)

    def check(self):
        """NotImplementedError for states that the layout cannot hold."""
        if self._states is not None:
            self._states.check()

    def collect(self):
        """Gets together what this rank writes. Collective."""
        self._frozen = self._frozen_fragments(self._ranges)
        if self._states is None:
            return
        self._optimizer, self._shapes = self._states.collect(), self._states.shapes()

    def _share(self):
        """({kind: dtype} of masters and states, {name: packed dict} of parameters) of all ranks; the first rank has the
        random states of all, too."""
        own, rank = self._contents.own, str(self._engine.global_rank)
        slots = {kind: _name(part.tensor.dtype) for (kind, _), part in self._parts.items()
                 if kind.startswith("state.") or kind == "master"}
        random = {name: [_name(part.tensor.dtype), base64.b64encode(part.values.numpy().tobytes()).decode()]
                  for (kind, name), part in self._parts.items() if kind == "rng"}
        rows = gather_json(self._engine._comm, {"scalars": own["scalars"], "slots": slots, "rng": own["rng"][rank],
                                                "random": random}, _CALL)
        text = b""
        if rows is not None:
            self._own = self._own_part(rows)
            text = json.dumps([[row["slots"], row["scalars"]] for row in rows]).encode()
        rows = json.loads(broadcast_bytes(self._engine._comm, text, 0, _CALL))
        place = list(self._contents.names.place())
        return ({kind: getattr(torch, dtype) for slots, _ in rows for kind, dtype in slots.items()},
                {name: packed for _, scalars in rows for name, where, packed in scalars if list(where) == place})

    def _own_part(self, rows):
        """What DeepSpeed's files have no place for, under a key of ours. rows: what all ranks have said."""
        sections = self._contents.sections
        tensors = {name: torch.frombuffer(bytearray(base64.b64decode(data)), dtype=getattr(torch, dtype))
                   for row in rows for name, (dtype, data) in row["random"].items()}
        return {"sections": {"counters": sections["counters"], "loader": sections["loader"],
                             "optimizer": sections["optimizer"], "frozen_excluded": bool(self._exclude_frozen),
                             "rng": {str(rank): row["rng"] for rank, row in enumerate(rows)}}, "tensors": tensors}

    def _all_ranges(self):
        """{name: [(first, n) of each rank]}: the elements of each parameter that the ranks that hold it write."""
        found = {}
        for comm in self._engine._reduction.comms:
            names = sorted(name for kind, name in self._parts if kind == "model" and self._comm_of[name] is comm)
            if not names:
                continue
            mine = torch.tensor([[self._parts["model", name].first, self._parts["model", name].n] for name in names],
                                dtype=torch.int64).flatten()
            rows = torch.zeros(comm.size * len(mine), dtype=torch.int64)
            comm.all_gather(rows, mine, _CALL)
            rows = rows.view(comm.size, len(names), 2).tolist()
            found.update((name, [tuple(row[i]) for row in rows]) for i, name in enumerate(names))
        return found

    def _frozen_fragments(self, ranges):
        """{name: values} of what the optimizer has not: at stage 3 this rank's part of each, at stage 2 all, else None.
        """
        if self._stage < 2 or self._exclude_frozen:
            return None
        found = OrderedDict()
        for name in ranges:
            part = self._parts["model", name]
            tensor = part.tensor
            if tensor.group != -1 and tensor.numel or self._comm_of[name] is not self._comm:
                continue
            if self._stage == 2:
                found[name] = part.values.as_strided(tensor.shape, tensor.stride)
                continue
            size = part_of_parameter(tensor.numel, self._comm.size)
            spans = spans_of_subgroup({name: tensor.shape}, self._comm.size)
            exchange = Exchange(self._comm, {name: ranges[name]}, spans, size)
            values = in_logical_order(self._comm, tensor, part, ranges[name], tensor.dtype, _CALL)
            found[name] = exchange.run({name: values}, tensor.dtype, _CALL)
        return found

    # ---- what each rank does ----

    def files(self, copied=lambda value: value):
        """{name: value} of what this rank writes. copied: applied to what may be memory that training changes."""
        found, rank = {}, self._comm.rank
        if self._optimizer is not None and self._stage:
            name = files.optimizer_file(self._number, rank, self._engine.bfloat16_enabled())
            found[name] = {"optimizer_state_dict": self._optimizer, "ds_config": self._engine.config,
                           "ds_version": LAYOUT_OF}
        for layer, (prefix, first, _, _) in enumerate(self._layers):
            for number, state in self._experts_of(prefix).items():
                found[files.expert_file(self._number, layer, first + number)] = copied(
                    {f"{prefix}{first + number}.{rest}": value for rest, value in state.items()})
        sharer = self._sharer()
        if self._optimizer is not None and not self._stage and sharer is not None:
            found[files.expert_optimizer_file(self._number, sharer)] = copied({"optimizer": self._optimizer})
        if self._stage == 3 or rank == 0:
            found[files.model_file(self._number, rank if self._stage == 3 else None)] = copied(self._model_state())
        return found

    def _sharer(self):
        """This rank's number among those that share out the experts of the layer with the most sharers, where it is the
        first that holds them; else None."""
        found = None
        for prefix, first, total, _ in self._layers:
            n_here = len(self._numbers_of(prefix))
            if self._first_holder(prefix) and (found is None or total // n_here > found[0]):
                found = total // n_here, first // n_here
        return None if found is None else found[1]

    def _numbers_of(self, prefix):
        return sorted({int(name.removeprefix(prefix).partition(".")[0]) for name in self._contents.names.parameters
                       if name.startswith(prefix)})

    def _first_holder(self, prefix):
        """Whether this rank is the first of those that hold the same experts."""
        names = self._contents.names
        return next(names.of_parameter(name, p)[2].rank == 0 for name, p in names.parameters.items()
                    if name.startswith(prefix))

    def _experts_of(self, prefix):
        """{number here: {rest of the name: value}} of the experts that this rank writes."""
        found = {}
        for name, value in self._module_state(experts=True).items() if self._first_holder(prefix) else ():
            if name.startswith(prefix):
                number, _, rest = name.removeprefix(prefix).partition(".")
                found.setdefault(int(number), {})[rest] = value
        return found

    def _model_state(self):
        engine, schedule = self._engine, self._engine.lr_scheduler
        frozen = self._frozen
        shapes = None if frozen is None else OrderedDict(
            (name, torch.Size(self._parts["model", name].tensor.shape)) for name in frozen)
        state = {
            "module": self._module_state(),
            "buffer_names": [name for name, _ in buffers_of(engine.module)],
            "optimizer": self._optimizer if self._stage == 0 else None,
            "param_shapes": self._shapes,
            "frozen_param_shapes": shapes,
            "shared_params": self._contents.sections.get("tied", {}) if self._stage else None,
            "frozen_param_fragments": frozen,
            "lr_scheduler": schedule.state_dict() if hasattr(schedule, "state_dict") else None,
            "data_sampler": None, "random_ltd": None,
            "skipped_steps": engine.skipped_steps, "global_steps": engine.global_steps,
            "global_samples": engine.global_samples, "dp_world_size": self._comm.size,
            "mp_world_size": engine.mp_world_size,
            "checkpoint_parallel_dimensions": {"pp_degree": engine._layout.pipe_size,
                                               "tp_degree": engine._layout.tensor_size},
            "ds_config": engine.config, "ds_version": LAYOUT_OF,
        }
        if self._layers:
            state.update(num_experts=[total for _, _, total, _ in self._layers], ds_autoep_layers=None)
        if self._own is not None:
            state[OWN_KEY] = self._own
        return {**state, **self._client_state}

    def _module_state(self, experts=False):
        """The module's state dict, without experts: at stage 3 parameters are empty; nothing brings along a larger
        storage."""
        prefixes = tuple(prefix for prefix, *_ in self._layers)
        state = self._engine.module.state_dict(keep_vars=True)
        names = {id(p): name for name, p in self._contents.names.parameters.items()}
        copies = {}
        for name, value in list(state.items()):
            if name.startswith(prefixes) and not experts:
                del state[name]
                continue
            if not isinstance(value, torch.Tensor):
                continue
            own = names.get(id(value))
            if self._exclude_frozen and own is not None and not value.requires_grad:
                del state[name]
            elif is_zero(value):
                state[name] = torch.empty(0, dtype=value.dtype)
            else:
                if id(value) not in copies:
                    whole = value.detach()
                    lean = whole.untyped_storage().nbytes() <= whole.nbytes
                    copies[id(value)] = whole if lean else whole.clone()
                state[name] = copies[id(value)]
        return state


def _name(dtype):
    return str(dtype).removeprefix("torch.")
