"""The extension itself: import, borrowing tensors by both roads of DLPack, objects in use, wrong arguments."""
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from deepspeed_c import _core


def test_import_prints_nothing_and_starts_no_thread_process_or_cuda():
    code = ("import threading, torch; before = threading.active_count(); import deepspeed_c; deepspeed_c.initialize; "
            "deepspeed_c.comm; assert threading.active_count() == before; assert not torch.cuda.is_initialized()")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_importing_the_core_imports_neither_numpy_nor_torch():
    code = ("import sys; import deepspeed_c._core; "
            "assert not {'torch', 'numpy'} & set(sys.modules), 'imported'")
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


class OldTensor:
    """A tensor of a torch without the C exchange table: only detach() and __dlpack__()."""

    def __init__(self, tensor):
        self.tensor = tensor

    def detach(self):
        return OldTensor(self.tensor.detach())

    def __dlpack__(self, **kwargs):
        return self.tensor.__dlpack__()


@pytest.fixture
def alone():
    comm = _core.Comm.self_(5.0)
    yield comm
    comm.close()


def test_tensors_are_borrowed_through_dlpack_capsules_too(alone):
    parameter = torch.nn.Parameter(torch.arange(4.0))
    alone.all_reduce(OldTensor(parameter), "sum")
    array = np.arange(6.0, dtype=np.float32)
    alone.all_reduce(array, "sum")
    assert parameter.tolist() == [0, 1, 2, 3] and array.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("wrong, text", [
    (torch.zeros(3, dtype=torch.complex64), "complex|dtype"), ("text", "tensor"), (None, "tensor"),
    (torch.zeros(4, 4).t(), "contiguous"), (torch.zeros(3, dtype=torch.uint8), "dtype")])
def test_a_wrong_tensor_is_an_error_that_says_what_is_allowed(alone, wrong, text):
    with pytest.raises((TypeError, ValueError, BufferError), match=text):
        alone.all_reduce(wrong, "sum")


def test_a_tensor_of_nine_dimensions_is_an_error(alone):
    with pytest.raises(ValueError, match="9 dimensions, allowed: at most 8"):
        alone.all_reduce(torch.zeros([1] * 9), "sum")


def engine_of(module):
    import deepspeed_c as deepspeed
    return deepspeed.initialize(model=module, model_parameters=module.parameters(), config={
        "train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}})[0]


def test_more_types_than_the_cache_of_tables_holds_change_no_reference_count(alone):
    kinds = [type(f"Kind{i}", (), {}) for i in range(8)]
    values = [kind() for kind in kinds]

    def offer_all():
        for value in (*values, torch.zeros(3)):
            try:
                alone.all_reduce(value)
            except TypeError:
                pass

    offer_all()
    before = [sys.getrefcount(kind) for kind in (*kinds, torch.Tensor)]
    for _ in range(50):
        offer_all()
    after = [sys.getrefcount(kind) for kind in (*kinds, torch.Tensor)]
    assert all(abs(a - b) <= 2 for a, b in zip(after, before)), (before, after)


def test_wrong_arguments_of_the_engine_are_errors_not_crashes():
    engine = engine_of(torch.nn.Linear(2, 2))
    core = engine._core
    for call in (lambda: core.hook(99), lambda: core.hook(-1), lambda: core.held(5, 0), lambda: core.held(0, 7)):
        with pytest.raises(IndexError):
            call()
    with pytest.raises(ValueError, match="list of 1 groups"):
        core.step([])
    with pytest.raises(TypeError, match="dict"):
        core.step([3])
    with pytest.raises(ValueError, match="betas has 3 items"):
        core.step([{"betas": (0.9, 0.9, 0.9)}])
    with pytest.raises(TypeError):
        _core.Engine(None, None, [], [], [], [], 1, "adam", 1, 0, None, None)
    comm, config = _core.Comm.self_(), _core.Config({"train_batch_size": 1}, 1)
    for ranks, wrong in (((comm, (), 1), "0 reduce groups"), ((comm, ((comm, 0),) * 17, 1), "17 reduce groups"),
                         ((comm, ((comm, 0),), 0), "averaged over 0 ranks")):
        with pytest.raises(ValueError, match=wrong):
            _core.Engine(ranks, config, [], [], [], [], 1, "adam", False, 1, 0, None, None)
    with pytest.raises(ValueError, match="reduce group 1 of 1"):
        _core.Engine((comm, ((comm, 0),), 1), config, [torch.zeros(3)], [torch.zeros(3)], ["w"], [(0, 1, True)],
                         1, "adam", False, 1, 0, None, None)
    core.close()
    core.close()
    with pytest.raises(RuntimeError, match="destroyed"):
        core.step([{}])


def test_sparse_gradients_are_an_error_that_says_not_yet():
    module = torch.nn.Embedding(10, 3, sparse=True)
    engine = engine_of(module)
    engine.backward(engine(torch.tensor([1, 2])).sum())
    with pytest.raises((NotImplementedError, TypeError, RuntimeError, BufferError), match="weight|sparse"):
        engine.step()


def test_an_engine_in_use_by_another_thread_says_so():
    module = torch.nn.Sequential(*(torch.nn.Linear(1500, 1500) for _ in range(6)))
    engine = engine_of(module)
    errors = []

    def steps():
        for _ in range(40):
            try:
                engine._core.step(engine.optimizer.param_groups)
            except RuntimeError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=steps) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors and all("already running" in e for e in errors)
