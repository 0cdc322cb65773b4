"""engine.save_checkpoint and load_checkpoint: who does what when, on all ranks.

Decides the order: ranks agree on the tag; a folder is made aside; each rank writes and syncs its file; the first rank
writes what all have told it and gives the folder its name. Invariant: under a tag stands a whole checkpoint or none,
and a call that raises on one rank raises on all.
"""
import atexit
import hashlib
import logging
import os
import threading
import time
import weakref

import torch

from .. import _core, _paths
from ..offload_states import MASTERS, PARAMETERS, STATES
from ..reduction import is_expert
from ..utils.logging import log_dist, logger
from .agree import broadcast_bytes, together

_SAVE, _LOAD = "save_checkpoint", "load_checkpoint"
_LATEST = "latest"
_PAUSE = 0.02  # seconds between two looks at what other ranks have written
_PATIENCE = 5.0  # seconds that a process which ends waits for other ranks' files, from when one last grew
_BAR_AFTER = 3.0  # seconds after which a save shows how far it is


class EngineCheckpoints:
    """A base of DeepSpeedEngine, which has: module, optimizer, _comm, _config, _run, _core, counters."""

    _saving = None  # the Saving that is under way

    def save_checkpoint(self, save_dir, tag=None, client_state={}, save_latest=True,  # noqa: B006 (as documented)
                        exclude_frozen_parameters=False, client_sd=None):
        """Writes everything that training goes on from to save_dir/tag. Collective. Returns True.

        tag: str(tag) names the folder; None: global_step{global_steps}. The ranks' tags are compared as
        checkpoint.tag_validation says. client_state (client_sd: another name): a dict of values, returned by
        load_checkpoint; rank 0's counts. save_latest: save_dir/latest names it. exclude_frozen_parameters: without
        parameters that are not trained. With checkpoint.async the files are written while the caller goes on; see
        checkpoint_commit().

        ValueError, TypeError for arguments; OSError with the path where a file cannot be written, CheckpointError on
        the other ranks; an earlier checkpoint of this tag is there still.
        """
        self.checkpoint_commit()
        self._take_replaced()
        state, problem = client_sd if client_sd is not None else client_state, None
        try:
            self._refuse_offloaded(_SAVE, MASTERS | PARAMETERS | STATES)
            save_dir = _folder_given(save_dir, "save_dir")
            tag = _tag_given(f"global_step{self.global_steps}" if tag is None else tag)
            if not isinstance(state, (dict, type(None))):
                raise TypeError(f"client_state is a {type(state).__name__}; allowed: a dict")
        except Exception as error:
            problem = error
        together(self._comm, problem, _SAVE)
        tag = self._agreed_tag(tag)
        self._warn_of_open_step()
        if self._writes_deepspeeds():
            from .deepspeed_writer import save
        else:
            from .native import save  # who saves nothing starts quicker without

        begun = time.monotonic()
        aside = Aside(self._comm, save_dir, tag, self.use_node_local_storage())
        try:
            if self._writes_deepspeeds() and len(aside.ranks) < self.world_size:
                raise NotImplementedError("checkpoint.use_node_local_storage over several nodes with checkpoint.format "
                                          "\"deepspeed\": not yet; allowed: \"native\"")
            self._saving = save(self, aside, state, save_latest, exclude_frozen_parameters)
        except BaseException:
            aside.abandon()
            raise
        how = "is being written" if self._saving else f"saved in {time.monotonic() - begun:.2f} s"
        log_dist(f"checkpoint {os.path.join(save_dir, tag)} {how}", ranks=[0])
        return True

    def checkpoint_commit(self):
        """Waits until the checkpoint that is being written (checkpoint.async) is there. Collective; nothing to do
        without one. Raises what went wrong, on all ranks; the checkpoint is not there then. Returns True."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.finish()
        return True

    def load_checkpoint(self, load_dir, tag=None, load_module_strict=True, load_optimizer_states=True,
                        load_lr_scheduler_states=True, load_module_only=False, custom_load_fn=None):
        """Takes what a checkpoint has, of any ZeRO stage, number of ranks and dtype. Collective.

        tag: None takes what load_dir/latest names. load_module_strict: the module and the checkpoint must have the same
        parameters and buffers. load_optimizer_states: masters, optimizer states, group options, loss scale, random
        generators; without them masters are the loaded weights. load_module_only: nothing but weights and buffers.
        custom_load_fn: called as custom_load_fn(src=state dict, dst=module) in place of loading the weights.

        Returns (the checkpoint's path, client state); (None, None), with a warning, where there is no tag and no
        `latest`. FileNotFoundError for a tag that is not there; CheckpointError naming file and tensor for what is
        damaged or does not fit. The engine has not changed then, on any rank.
        """
        from .restore import Options, restore

        self.checkpoint_commit()
        self._take_replaced()
        source, problem = None, None
        try:
            load_dir = _folder_given(load_dir, "load_dir")
            tag = latest_tag(load_dir) if tag is None else _tag_given(tag)
        except Exception as error:
            problem = error
        together(self._comm, problem, _LOAD)
        tag = self._agreed_tag(tag or "")
        if not tag:
            log_dist(f"load_checkpoint: {os.path.join(load_dir, _LATEST)} is not there and no tag was given: nothing "
                     "was loaded", ranks=[0], level=logging.WARNING)
            return None, None
        source = self._source(load_dir, tag)
        options = Options(load_module_strict, load_optimizer_states, load_lr_scheduler_states, load_module_only,
                          custom_load_fn)
        client = restore(self, source, options)
        path = source.load_path(self)
        log_dist(f"checkpoint {os.path.join(load_dir, tag)} loaded", ranks=[0])
        return path, client

    def _source(self, load_dir, tag):
        """What is loaded from. Collective."""
        source, problem = None, None
        try:
            source = source_of(load_dir, tag, self)
        except Exception as error:
            problem = error
        together(self._comm, problem, _LOAD)
        if self.use_node_local_storage() and hasattr(source, "file_names"):
            from .nodes import Nodes

            nodes = Nodes(self._comm)
            if nodes.n > 1:
                nodes.complete(os.path.join(load_dir, tag), source.file_names(), _LOAD)
        return source

    def _writes_deepspeeds(self):
        """Whether save_checkpoint writes DeepSpeed's own layout: as checkpoint.format says, else where the package is
        imported by DeepSpeed's name, but for experts at stage 3, which that layout does not know."""
        chosen = self._config.get("checkpoint.format")
        if chosen is not None:
            return chosen == "deepspeed"
        return _paths.is_known_as("deepspeed") and not (
            self.zero_optimization_stage() == 3 and any(map(is_expert, self.module.parameters())))

    def checkpoint_tag_validation_enabled(self):
        """Whether the ranks' tags are compared aloud: ``checkpoint.tag_validation`` is not "Ignore"."""
        return self._config.get("checkpoint.tag_validation") != "Ignore"

    def checkpoint_tag_validation_fail(self):
        """Whether different tags are an error: ``checkpoint.tag_validation`` is "Fail"."""
        return self._config.get("checkpoint.tag_validation") == "Fail"

    def _agreed_tag(self, tag):
        """Rank 0's tag. ValueError on all ranks where they differ and that is to be an error. Collective."""
        comm = self._comm
        digest = hashlib.blake2b(tag.encode(), digest_size=8).digest()
        found = torch.zeros(8 * comm.size, dtype=torch.uint8)
        comm.all_gather(found, torch.frombuffer(bytearray(digest), dtype=torch.uint8), "checkpoint tag")
        found = found.view(comm.size, 8).tolist()
        others = [rank for rank, other in enumerate(found) if other != found[0]]
        if not others:
            return tag
        first, other = (broadcast_bytes(comm, tag.encode(), rank, "checkpoint tag").decode()
                        for rank in (0, others[0]))
        text = f"the checkpoint's tag is {first!r} on rank 0 and {other!r} on rank {others[0]}"
        if self.checkpoint_tag_validation_fail():
            raise ValueError(f"{text}; checkpoint.tag_validation is \"Fail\"")
        if self.checkpoint_tag_validation_enabled() and self.global_rank == 0:
            logger.warning("%s; rank 0's is used", text)
        return first

    def _warn_of_open_step(self):
        if self._core is not None and self._scaled and self.global_rank == 0:
            logger.warning("save_checkpoint inside an open step: gradients are not part of a checkpoint")

    def _let_change(self):
        """Before masters or optimizer states change. Raises what the file of this rank that is being written met with,
        once; checkpoint_commit() raises it again, on all ranks."""
        if self._saving is not None:
            self._saving.detach()
            self._saving.raise_failure()


def _folder_given(value, name):
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed: a path")
    if not os.fspath(value):
        raise ValueError(f"{name} is empty; allowed: the path of a folder")
    return os.path.abspath(os.fspath(value))


def _tag_given(tag):
    tag = str(tag)
    if not tag or tag in (".", "..", _LATEST) or "/" in tag or "\0" in tag or tag.startswith(".saving-"):
        raise ValueError(f"tag is {tag!r}; allowed: a name for a folder, without '/'")
    return tag


def latest_tag(load_dir):
    """What load_dir/latest names; None where there is no such file. FileNotFoundError for one that names nothing."""
    path = os.path.join(load_dir, _LATEST)
    try:
        with open(path, "rb") as file:
            tag = file.read(4096).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    try:
        return _tag_given(tag)
    except ValueError:
        raise _no_tag(load_dir, tag, f"{path} names it") from None


def _no_tag(load_dir, tag, why):
    there = sorted(entry.name for entry in os.scandir(load_dir) if entry.is_dir() and not entry.name.startswith(".")) \
        if os.path.isdir(load_dir) else []
    known = f"it has {', '.join(map(repr, there[:8]))}" if there else "it has none"
    return FileNotFoundError(2, f"there is no checkpoint {tag!r} ({why}); {known}", os.path.join(load_dir, tag))


def source_of(load_dir, tag, engine=None):
    """The source (see restore.py) of a checkpoint of either format. engine: who loads; it knows what an optimizer's
    parameters are called where DeepSpeed's files do not say. FileNotFoundError, CheckpointError."""
    from .native import MANIFEST, NativeSource

    folder = os.path.join(load_dir, tag)
    if not os.path.isdir(folder):
        raise _no_tag(load_dir, tag, "it was asked for, or 'latest' names it")
    names = os.listdir(folder)
    if MANIFEST in names:
        return NativeSource(folder)
    from .deepspeed_reader import DeepSpeedSource, is_deepspeed, names_in

    if is_deepspeed(folder):
        return DeepSpeedSource(folder, None if engine is None else names_in(engine))
    raise _core.CheckpointError(f"{folder}: no {MANIFEST} in it, and no *_model_states.pt: this is no checkpoint")


class Aside:
    """The folder in which a checkpoint is made until it is whole: one for all ranks, which rank 0 makes, or with
    node_local one on each node. Collective. Attributes: comm, path (where this rank writes), leads (this rank has made
    a folder), ranks (those that write there)."""

    def __init__(self, comm, save_dir, tag, node_local=False):
        self.comm, self.leads, self.ranks = comm, comm.rank == 0, list(range(comm.size))
        self._folder, self.path, problem = None, "", None
        if node_local:
            from .nodes import Nodes

            nodes = Nodes(comm)
            self.leads, self.ranks = nodes.leader, nodes.local
        try:
            if self.leads:
                os.makedirs(save_dir, exist_ok=True)
                self._folder = _core.checkpoint_folder(save_dir, tag)
                self.path = self._folder.path
        except Exception as error:
            problem = error
        together(comm, problem, _SAVE)
        where = os.path.relpath(self.path, save_dir) if node_local and self.leads else self.path
        where = os.fsdecode(broadcast_bytes(comm, os.fsencode(where), 0, _SAVE))
        self.path = os.path.join(save_dir, where)  # which is `where` itself, unless that is relative

    def write(self, name, data):
        """Who leads: a small file in the folder, synced."""
        self._folder.write(name, data)

    def publish(self, save_latest):
        """Who leads: the folder gets its name; `latest` names it. The script that joins weights stands beside."""
        from ..utils.zero_to_fp32 import SCRIPT

        self._folder.publish(save_latest, beside={"zero_to_fp32.py": SCRIPT.encode()})

    def abandon(self):
        """Who leads: the folder goes; elsewhere nothing."""
        if self._folder is not None:
            self._folder.abandon()


class Saving:
    """A checkpoint that is being written while training goes on. Each rank's file is written by the core's thread; who
    has made the folder has a thread that waits for all of `names` in it and ends the checkpoint. complete: called by
    that thread. tell: called on every rank when its own file is whole; writer.detach() says then when masters and
    states may change."""

    def __init__(self, aside, writer, names, complete, tell=None):
        self._aside, self._writer, self._names, self._complete, self._tell = aside, writer, names, complete, tell
        self._failure, self._said, self._stop = None, False, threading.Event()
        self._attached, self._lock = tell is not None, threading.Lock()  # a writer serves one call at a time
        self._thread = None
        if aside.leads or tell is not None:
            self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
            self._thread.start()
        _UNDER_WAY.add(self)

    def _run(self):
        try:
            if self._tell is not None:
                self._tell_when_written()
            if self._aside.leads:
                self._wait_and_complete()
        except Exception as error:
            self._failure = error

    def _tell_when_written(self):
        while not self._writer.done():
            if self._stop.wait(_PAUSE):
                return
        with self._lock:
            self._writer.wait()
            self._tell()

    def _wait_and_complete(self):
        left = set(self._names)
        while left and not self._stop.is_set():
            left = {name for name in left if not os.path.exists(os.path.join(self._aside.path, name))}
            if left:
                self._stop.wait(_PAUSE)
        if not left:
            self._complete()

    def detach(self):
        """On return masters and optimizer states may change."""
        if self._attached:
            with self._lock:
                self._writer.detach()
            self._attached = False

    def raise_failure(self):
        """What the writing of this rank's file met with, if it is known by now; raised once."""
        if not self._said and self._writer.done():
            try:
                with self._lock:
                    self._writer.wait()
            except Exception:
                self._said = True
                raise

    def finish(self):
        """Collective; see checkpoint_commit()."""
        comm, problem = self._aside.comm, None
        try:
            self._wait()
        except Exception as error:
            problem = error
        try:
            together(comm, problem, "checkpoint_commit")
        except BaseException:
            self._stop.set()
            self._join()
            self._aside.abandon()
            raise
        self._join()
        if self._failure is not None:
            self._aside.abandon()
        together(comm, self._failure, "checkpoint_commit")

    def _wait(self):
        """Until this rank's file is whole, and that is told."""
        with self._lock:
            self._writer.wait()
        if self._tell is not None and not self._aside.leads:
            self._thread.join()
            if self._failure is not None:
                raise self._failure

    def _join(self):
        if self._thread is not None:
            self._thread.join()
        _UNDER_WAY.discard(self)

    def end(self):
        """At exit: what this rank can still do by itself."""
        try:
            self._wait()
        except Exception as error:
            logger.error("the checkpoint that was being written is not there: %s", error)
            return
        seen, since = None, time.monotonic()
        while self._thread is not None and self._thread.is_alive() and time.monotonic() - since < _PATIENCE:
            self._thread.join(_PAUSE)
            now = _sizes(self._aside.path)
            if now != seen:
                seen, since = now, time.monotonic()
        if self._thread is not None and (self._thread.is_alive() or self._failure is not None):
            logger.error("the checkpoint that was being written is not there: %s",
                         self._failure or "other ranks have not written their files")


def _sizes(folder):
    """{name: bytes} of the files that are being written."""
    try:
        return {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    except OSError:
        return None


_UNDER_WAY = weakref.WeakSet()


@atexit.register
def _end_all():
    for saving in list(_UNDER_WAY):
        saving.end()


class Bar:
    """Shows rank 0's progress on stderr once a save takes long. total: bytes."""

    def __init__(self, comm, total):
        self._bar, self._shown = None, 0
        if comm.rank == 0:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="checkpoint (rank 0)",
                             delay=_BAR_AFTER, leave=False)

    def __call__(self, done):
        """done: bytes so far."""
        if self._bar is not None:
            self._bar.update(done - self._shown)
            self._shown = done

    def close(self):
        """Takes it away."""
        if self._bar is not None:
            self._bar.close()
