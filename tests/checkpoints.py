"""Checkpoints without files, for tests: what ranks have, put together, is a source to load from."""
import copy

import torch

from deepspeed_c.checkpoint.contents import Contents


def taken(engine, **more):
    """This rank's part of a checkpoint: ([(Tensor, first, values)], sections, own sections, objects)."""
    contents = Contents(engine, **more)
    rows = [(part.tensor, part.first, part.written().clone()) for part in contents.parts]
    return rows, copy.deepcopy(contents.sections), contents.own, contents.objects


class MemorySource:
    """All ranks' parts, [taken()] by rank. Elements that nobody wrote, or two ranks did, are an AssertionError."""

    def __init__(self, ranks):
        self.tensors, self.values, seen = {}, {}, {}
        for rows, _, _, _ in ranks:
            for tensor, first, values in rows:
                if tensor.key not in self.tensors:
                    self.tensors[tensor.key] = tensor
                    self.values[tensor.key] = torch.empty(tensor.numel, dtype=tensor.dtype)
                    seen[tensor.key] = torch.zeros(tensor.numel, dtype=torch.int32)
                assert self.tensors[tensor.key] == tensor
                self.values[tensor.key][first:first + len(values)] = values
                seen[tensor.key][first:first + len(values)] += 1
        assert all(bool((count == 1).all()) for count in seen.values())
        self.sections, self.objects = copy.deepcopy(ranks[0][1]), ranks[0][3]
        self.sections["scalars"] = [row for _, _, own, _ in ranks for row in own["scalars"]]
        self.sections["rng"] = {rank: state for _, _, own, _ in ranks for rank, state in own["rng"].items()}

    def read(self, kind, name, place, begin, n, out):
        """Elements of a tensor."""
        out.copy_(self.values[kind, name, place][begin:begin + n])

    def check(self, kind, name, place, begin, n):
        """Nothing can be damaged here but the range that is asked for."""
        assert 0 <= begin and begin + n <= self.tensors[kind, name, place].numel

    def object(self, number):
        """What is neither JSON nor a tensor."""
        return self.objects[number]

    def path_of(self, kind, name, place):
        """For texts."""
        return "memory"


def state_of(engine):
    """Every number that decides how training goes on, on this rank, in an order of its own: bytes by name."""
    parts = Contents(engine).parts
    found = {(*part.tensor.key, part.begin): part.values.contiguous().view(torch.uint8).numpy().tobytes()
             for part in parts if part.tensor.kind != "rng" and part.values.numel()}
    found["counters"] = (engine.global_steps, engine.global_samples, engine.skipped_steps, engine._core.scaler,
                         engine.get_lr())
    return found
