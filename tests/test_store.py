"""_core.Store: tensors over memory that all ranks of a communicator have once."""
import gc
import os

import pytest
import torch
from torch.utils.dlpack import from_dlpack

from deepspeed_c import _core
from deepspeed_c.distributed import engine_comm, init_distributed


def share(rank, world):
    init_distributed()
    store = _core.Store(engine_comm())
    found = {}
    for dtype in (torch.float32, "bfloat16", torch.int64, torch.bool, torch.complex64):
        tensor = from_dlpack(store.take(1000, dtype))
        assert tensor.data_ptr() % 64 == 0 and tensor.storage_offset() == 0 and not tensor.any()
        assert tensor.untyped_storage().nbytes() == 1000 * tensor.element_size()
        found[tensor.dtype] = tensor
    assert from_dlpack(store.take(0, torch.float16)).shape == (0,)
    engine_comm().barrier()
    found[torch.float32][rank::world] = float(1 + rank)
    store.agree("written")
    store.close()
    store.close()
    with pytest.raises(RuntimeError, match="closed"):
        store.take(1, "float32")
    del store
    gc.collect()
    seen = [float(found[torch.float32][r]) for r in range(world)]
    engine_comm().barrier()
    return seen, [str(dtype) for dtype in found]


@pytest.mark.parametrize("world", [1, 2])
def test_tensors_of_a_store_are_one_memory_and_outlive_it(ranks, world):
    names = ["torch.float32", "torch.bfloat16", "torch.int64", "torch.bool", "torch.complex64"]
    assert ranks(world, share) == [([1.0 + r for r in range(world)], names)] * world


def flat_over_lives(rank, world):
    init_distributed()
    files, maps = [], []
    for _ in range(30):
        store = _core.Store(engine_comm())
        tensors = [from_dlpack(store.take(1 << 18, "float32")) for _ in range(3)]
        tensors[0].fill_(1)
        engine_comm().barrier()
        del store, tensors
        gc.collect()
        files.append(len(os.listdir("/proc/self/fd")))
        with open("/proc/self/maps") as lines:
            maps.append(sum(1 for _ in lines))
    return files[-1] - files[5], maps[-1] - maps[5]


def test_thirty_stores_leave_no_descriptor_and_no_mapping(ranks):
    assert all(more_files <= 0 and more_maps <= 1 for more_files, more_maps in ranks(2, flat_over_lives))


def test_wrong_arguments_of_a_store_are_errors():
    comm = _core.Comm.self_(5.0)
    store = _core.Store(comm)
    with pytest.raises(TypeError, match="dtype is float8; allowed: float32"):
        store.take(3, "float8")
    with pytest.raises(ValueError, match="n_elems is -1; allowed: 0 to"):
        store.take(-1, "float32")
    with pytest.raises(ValueError, match="n_elems is"):
        store.take(2**62, "float64")
    with pytest.raises(TypeError):
        _core.Store(torch.zeros(3))
    store.take(5, "float32")  # a capsule that nobody consumes
    assert store.counters() == {"n_bytes": 64, "n_slabs": 1}
    comm.close()


def engine_over(parts_of):
    """An engine of one rank whose parameter is a part that it was given; (parameter, engine)."""
    comm = _core.Comm.self_(5.0)
    config = _core.Config({"train_batch_size": 1, "gradient_clipping": 0, "zero_optimization": {"stage": 1}}, 1)
    p = torch.nn.Parameter(torch.ones(4, 8))
    core = _core.Engine((comm, ((comm, 0),), 1), config, [p], [p.data], ["w"], [(0, 0, True)], 1, "sgd", False, 1, 0,
                        lambda full, grad: torch.empty_like(full).copy_(grad),
                        torch.autograd.graph.increment_version)
    core.keep_parts(parts_of)
    return p, core


def test_an_engine_steps_the_parts_that_it_was_given():
    part = torch.full((32,), 2.0)
    p, core = engine_over([part])
    for grad in (torch.ones(4, 8), torch.ones(8, 4).t()):  # the second in another memory order
        p.grad = grad
        core.begin_backward(True)
        core.end_backward(True)
        core.step([{"lr": 0.5}])
        assert p.grad is None
    assert part.unique().tolist() == [1.0] and p.unique().tolist() == [1.0]
    part.zero_()
    core.keep_parts([None])
    p.grad = torch.ones(4, 8)
    core.step([{"lr": 0.25}])
    assert not part.any() and p.unique().tolist() == [0.75]


def test_parts_that_do_not_fit_are_errors():
    for wrong, error in ([torch.zeros(31)], ValueError), ([torch.zeros(32).bfloat16()], ValueError), \
            ([torch.zeros(64)[::2]], ValueError), ([], TypeError), (torch.zeros(32), TypeError):
        with pytest.raises(error, match="part of parameter w|list of 1 tensors"):
            engine_over(wrong)
