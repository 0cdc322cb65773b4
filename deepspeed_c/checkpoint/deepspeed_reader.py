"""A checkpoint in DeepSpeed's own layout as a Source: what loading, zero_to_fp32 and the tools read from.

Decides which files a checkpoint is made of. Invariant: every tensor's pieces cover its elements once, each over the
memory of one file, and no piece is read before its checksum was compared. Stages 0 to 3, any number of ranks, experts;
not pipelines, and not the universal format.
"""
import os

import torch

from .._core import CheckpointError
from . import deepspeed_files as files
from .contents import HERE, Names, Tensor, row_major
from .deepspeed_files import File, Piece
from .deepspeed_meaning import OWN_KEY, Place
from .packing import pack

# Keys of a file with the module's values that are not the caller's.
_NOT_CLIENT = {"module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
               "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names",
               "skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size",
               "checkpoint_parallel_dimensions", "ds_config", "ds_version", "num_experts", "ds_autoep_layers",
               "autoep_layers", "universal_checkpoint_info", OWN_KEY}


def is_deepspeed(folder):
    """Whether a folder holds a checkpoint in DeepSpeed's layout."""
    try:
        return any(files.MODEL_FILE.fullmatch(name) for name in os.listdir(folder))
    except OSError:
        return False


def names_in(engine):
    """What an optimizer's parameters may be called on this rank, in its order: two lists of groups of names, the
    trained ones and all; None without an optimizer."""
    if engine._run is None:
        return None
    known = {id(p): name for name, p in Names(engine).parameters.items()}
    groups = [group["params"] for group in engine.basic_optimizer.param_groups]
    return [[[known[id(p)] for p in group if p.requires_grad] for group in groups],
            [[known[id(p)] for p in group] for group in groups]]


class DeepSpeedSource:
    """What lies in `folder`.

    names: see names_in(); what stage 0 does not say. Without it what the optimizer has there is known by numbers,
    "(parameter 3)" or "(group 0)".
    Attributes: tensors {(kind, name, place): Tensor}, sections ({name: value for JSON}, as contents.Contents has them).
    CheckpointError for what is missing or damaged; NotImplementedError for pipelines.
    """

    def __init__(self, folder, names=None):
        self.folder, self.names = folder, names
        self.tensors, self.sections = {}, {"scalars": []}
        self._pieces, self._objects, self._small = {}, [], {}
        self._listing = sorted(os.listdir(folder))
        try:
            self._read_folder()
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{folder}: its files are not as DeepSpeed writes them ({error!r})") from error

    def object(self, number):
        """What a section has that is neither JSON nor a tensor."""
        return self._objects[number]

    # ---- what loading asks ----

    def read(self, kind, name, place, begin, n, out):
        """Writes elements [begin, begin + n) into out (one dimension, the tensor's dtype), each checked first."""
        for piece, first, last in self._touched(kind, name, place, begin, n):
            piece.check(name)
            out[first - begin:last - begin].copy_(piece.values[first - piece.begin:last - piece.begin])

    def check(self, kind, name, place, begin, n):
        """CheckpointError unless read() of the same would do."""
        for piece, _, _ in self._touched(kind, name, place, begin, n):
            piece.check(name)

    def path_of(self, kind, name, place=HERE):
        """The file that holds the first element; the folder where nothing is known of it."""
        pieces = self._pieces.get((kind, name, place))
        return pieces[0].file.path if pieces else self.folder

    def load_path(self, engine):
        """What load_checkpoint names: the file with the module's values that is this rank's."""
        layout = engine._layout
        rank = None
        if engine.zero_optimization_stage() == 3:
            rank = layout.data_ranks.index(engine.global_rank)
        number = layout.tensor_rank + layout.tensor_size * layout.pipe_rank
        for each in (rank, 0, None):
            path = os.path.join(self.folder, files.model_file(number, each))
            if os.path.exists(path):
                return path
        return self.folder

    def verify(self, progress=None):
        """CheckpointError where any file is damaged. progress(bytes so far) is called after each file."""
        done = 0
        for name in self._listing:
            if name.endswith(".pt"):
                path = os.path.join(self.folder, name)
                files.verify(path)
                done += os.path.getsize(path)
                if progress is not None:
                    progress(done)

    def _touched(self, kind, name, place, begin, n):
        """(piece, first, last) of those that hold elements of [begin, begin + n)."""
        for piece in self._pieces[kind, name, place]:
            first, last = max(begin, piece.begin), min(begin + n, piece.begin + len(piece.values))
            if first < last:
                yield piece, first, last

    # ---- reading the folder ----

    def _read_folder(self):
        models = self._model_files()
        for place in sorted(models):
            Place(self, place, models[place]).add()
        first = models[min(models)]
        self._add_sections(first[min(first, key=lambda rank: rank or 0)], len(models))

    def _model_files(self):
        """{place: {data-parallel rank (None below stage 3): File}}"""
        found = {}
        for name in self._listing:
            match = files.MODEL_FILE.fullmatch(name)
            if match:
                rank = None if match["rank"] is None else int(match["rank"])
                found.setdefault(int(match["place"]), {})[rank] = File(self.folder, name)
        if not found:
            raise CheckpointError(f"{self.folder} holds no *_model_states.pt")
        for place, by_rank in found.items():
            if None in by_rank and len(by_rank) > 1:
                raise CheckpointError(f"{self.folder} holds {files.model_file(place)} (of a stage below 3) and "
                                      f"{files.model_file(place, min(set(by_rank) - {None}))} (of stage 3): they are "
                                      "of two checkpoints")
        return found

    def optimizer_files(self, place, bf16):
        """{data-parallel rank: File}; where there are some of both names, those of that dtype."""
        found = {True: {}, False: {}}
        for name in self._listing:
            match = files.OPTIMIZER_FILE.fullmatch(name)
            if match and int(match["place"]) == place:
                found[bool(match["bf16"])][int(match["rank"])] = File(self.folder, name)
        return found[bf16] or found[not bf16]

    def expert_files(self, place):
        """[(number of the layer, File)]"""
        found = []
        for name in self._listing:
            match = files.EXPERT_FILE.fullmatch(name)
            if match and int(match["place"]) == place:
                found.append((int(match["layer"]), File(self.folder, name)))
        return found

    def expert_optimizers(self, number):
        """[File], by rank, in which a run with experts and without ZeRO keeps its states."""
        found = {}
        for name in self._listing:
            match = files.EXPERT_OPTIMIZER_FILE.fullmatch(name)
            if match and int(match["place"]) == number:
                found[int(match["rank"])] = File(self.folder, name)
        return [found[rank] for rank in sorted(found)]

    def add(self, tensor, pieces, rounded=False):
        """pieces: [Piece] in order; rounded: their values are fp32, and the tensor's what reading rounds them to."""
        n = sum(len(piece.values) for piece in pieces)
        dtype = torch.float32 if rounded else tensor.dtype
        if n != tensor.numel or any(piece.values.dtype != dtype for piece in pieces):
            where = pieces[0].file.path if pieces else self.folder
            raise CheckpointError(f"{where}: {tensor.kind} of {tensor.name} has {n} elements, and {tensor.numel} "
                                  f"({dtype}) are needed for its shape {tensor.shape}")
        self.tensors[tensor.key], self._pieces[tensor.key] = tensor, pieces

    def regroup(self, tensor, group):
        """A known Tensor is of that parameter group."""
        self.tensors[tensor.key] = Tensor(*tensor.key, tensor.dtype, tensor.shape, tensor.stride, group)

    def packed(self, value, file, name):
        """What a section has of a value that stands in a file under that name; its tensors become small ones."""
        for tensor in _tensors_in(value):
            file.check(tensor, name)
        known = len(self._small)
        packed = pack(value, self._small, self._objects)
        for small in list(self._small)[known:]:
            self._add_small("client", small, self._small[small], file)
        return packed

    def _add_sections(self, file, n_places):
        state = file.value
        client = {key: value for key, value in state.items() if key not in _NOT_CLIENT}
        schedule, config = state.get("lr_scheduler"), state.get("ds_config") or {}
        self.sections.update({
            "counters": {key: state[key] for key in ("global_steps", "global_samples", "skipped_steps")
                         if key in state},
            "schedule": None if schedule is None else self.packed({"class": None, "state": schedule}, file,
                                                                  "lr_scheduler"),
            "client": self.packed(client, file, "client state"),
            "config": self.packed(config, file, "ds_config"),
            "world": {"data": state.get("dp_world_size"), "tensor": state.get("mp_world_size") or n_places,
                      "stage": (config.get("zero_optimization") or {}).get("stage", 0)},
            "made_by": f"DeepSpeed {state.get('ds_version')}",
        })
        own = state.get(OWN_KEY)
        if own is not None:
            self._add_own(own, file)

    def _add_own(self, own, file):
        """What this engine has added, which another's checkpoints have not."""
        counters = {**self.sections["counters"], **own["sections"].pop("counters")}
        self.sections.update({**own["sections"], "counters": counters, "made_by": "deepspeed_c"})
        for name, value in own["tensors"].items():
            file.check(value, name)
            self._add_small("rng", name, value, file)

    def _add_small(self, kind, name, value, file):
        self.add(Tensor(kind, name, HERE, value.dtype, tuple(value.shape), row_major(value.shape)),
                 [Piece(0, value.flatten(), file, checked=True)] if value.numel() else [])


def _tensors_in(value):
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item)
