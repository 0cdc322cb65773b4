"""Groups of ranks by what is parallel: expert groups, parallel states, topologies, and what an mpu says.

Which ranks form a group is arithmetic, tested against brute force in tests/c/test_topo.c; here it is whether torch's
groups, and our collectives over them, are over those ranks, and what is said where something is not there. What needs
four ranks runs in one start of four processes.
"""
import inspect
import itertools
import math
import traceback
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from deepspeed_c._core import Config, Grid, lay_out

import deepspeed_c as deepspeed
from deepspeed_c import DeepSpeedConfigError, comm, rank_groups
from deepspeed_c.distributed import group_comm
from deepspeed_c.mpu import mpu_layout
from deepspeed_c.runtime.pipe.topology import (
    PipeDataParallelTopology,
    PipelineParallelGrid,
    PipeModelDataParallelTopology,
    ProcessTopology,
)
from deepspeed_c.utils import groups
from deepspeed_c.utils import parallel_state_deepspeed as ps
from deepspeed_c.utils.parallel_state import ParallelState


def members(group):
    """The global ranks that a collective over the group reaches, through our communicator and through torch's."""
    found = torch.zeros(dist.get_world_size())
    found[dist.get_rank()] = 1
    for all_reduce in (comm.all_reduce, dist.all_reduce):
        reached = found.clone()
        all_reduce(reached, group=group)
        assert torch.nonzero(reached).flatten().tolist() == dist.get_process_group_ranks(group)
    return dist.get_process_group_ranks(group)


# ---- what runs on four ranks ----

CHECKS = {}


def on_four_ranks(check):
    CHECKS[check.__name__.replace("_", " ")] = check
    return check


def run_checks(rank, world):
    deepspeed.init_distributed()
    said = {}
    for name, check in CHECKS.items():
        try:
            check(rank)
        except (Exception, pytest.fail.Exception):
            said[name] = traceback.format_exc()
    return said


@pytest.fixture(scope="module")
def four(ranks):
    return ranks(4, run_checks, timeout=120)


# ---- utils.groups ----

def without_groups():
    return [(groups.get_model_parallel_group, "no model parallel group: pass an mpu"),
            (groups.get_tensor_model_parallel_group, "no tensor model parallel group: pass an mpu"),
            (groups._get_sequence_parallel_group, "no sequence parallel group.*sequence_parallel_size")]


@on_four_ranks
def without_an_mpu_all_ranks_are_parallel_over_data(rank):
    for group in (groups._get_data_parallel_group(), groups.get_data_parallel_group(),
                  groups._get_sequence_data_parallel_group()):
        assert group is dist.group.WORLD
    assert groups._get_data_parallel_group_ranks() == [0, 1, 2, 3]
    for kind, expected in (("data_parallel", (4, rank)), ("sequence_data_parallel", (4, rank)),
                           ("sequence_parallel", (1, 0))):
        found = [getattr(groups, f"_get_{kind}_{what}")() for what in ("world_size", "rank")]
        assert tuple(found) == expected, kind
    for kind in ("model_parallel", "tensor_model_parallel"):
        assert getattr(groups, f"get_{kind}_world_size")() == 1 and getattr(groups, f"get_{kind}_rank")() == 0
    assert groups._get_broadcast_src_rank() == 0 and groups.get_tensor_model_parallel_src_rank() == rank
    for getter, why in without_groups():
        with pytest.raises(RuntimeError, match=why):
            getter()


@on_four_ranks
def expert_groups_are_those_of_the_default_layout(rank):
    assert groups._get_max_expert_size() is None and groups._get_expert_parallel_group_dict() == {}
    with pytest.raises(RuntimeError, match="no expert groups 'ep_size_2'; there are: none"):
        groups._get_expert_parallel_group("ep_size_2")
    for size in (2, 1, 4, 2):  # the last is there already
        groups._create_expert_and_data_parallel(size)
    start = rank // 2 * 2
    expected = {"ep_size_2": ([start, start + 1], [rank % 2, rank % 2 + 2]), "ep_size_1": ([rank], [0, 1, 2, 3]),
                "ep_size_4": ([0, 1, 2, 3], [rank])}
    for name, (experts, data) in expected.items():
        assert members(groups._get_expert_parallel_group(name)) == experts
        assert members(groups._get_expert_data_parallel_group(name)) == data
        assert groups._get_expert_parallel_group_ranks(name) == experts
        assert groups._get_expert_data_parallel_group_ranks(name) == data
        assert groups._get_expert_parallel_world_size(name) == len(experts)
        assert groups._get_expert_data_parallel_world_size(name) == len(data)
        assert groups._get_expert_parallel_rank(name) == experts.index(rank)
        assert groups._get_expert_data_parallel_rank(name) == data.index(rank)
        assert groups._get_expert_parallel_src_rank(name) == experts[0]
        assert groups._get_expert_broadcast_src_rank(name) == data[0]
        assert groups._get_expert_parallel_group_dict()[name] is groups._get_expert_parallel_group(name)
        assert groups._get_expert_data_parallel_group_dict()[name] is groups._get_expert_data_parallel_group(name)
    assert groups._get_max_expert_size() == 4 and groups._get_max_expert_size_name() == "ep_size_4"
    assert groups._get_max_expert_parallel_group() is dist.group.WORLD
    with pytest.raises(RuntimeError, match="no expert groups 'ep_size_3'; there are: ep_size_2, ep_size_1, ep_size_4"):
        groups._get_expert_data_parallel_rank("ep_size_3")


@on_four_ranks
def expert_groups_that_cannot_be_are_errors_with_the_numbers(rank):
    with pytest.raises(ValueError, match="4 ranks do not divide by tensor x expert x pipeline = 1 x 3 x 1"):
        groups._create_expert_and_data_parallel(3)
    start = rank // 2 * 2
    with pytest.raises(ValueError, match=rf"ep_size_2 exists over ranks \[{start}, {start + 1}\].* cannot be over"):
        groups._create_expert_and_data_parallel(2, use_data_before_expert_parallel_=True)
    with pytest.raises(NotImplementedError, match="AutoEP"):
        groups._create_expert_and_data_parallel(2, mp_size=2)
    assert groups._get_expert_parallel_group_ranks("ep_size_2") == [start, start + 1]


@on_four_ranks
def equal_sets_of_ranks_share_a_group(rank):
    data, model = groups._create_model_parallel(2)
    assert data is groups._get_expert_data_parallel_group("ep_size_2")
    assert model is groups._get_expert_parallel_group("ep_size_2")
    groups._create_zero_param_parallel_group(2)
    assert groups._get_zero_param_intra_parallel_group() is model
    assert groups._get_zero_param_intra_parallel_group_ranks() == dist.get_process_group_ranks(model)
    assert groups._get_zero_param_intra_parallel_group_world_size() == 2
    assert groups._get_zero_param_intra_parallel_rank_in_mygroup() == rank % 2
    with pytest.raises(RuntimeError, match="exist already, of 2 ranks"):
        groups._create_zero_param_parallel_group(2)
    with pytest.raises(ValueError, match="4 ranks do not divide"):
        groups._create_model_parallel(3)
    nodes = groups._get_local_all_to_all_group()
    assert {name: dist.get_process_group_ranks(group) for name, group in nodes.items()} == {
        "local_0": [0, 1, 2, 3], f"global_{rank}": [rank]}


@on_four_ranks
def a_group_that_was_destroyed_is_not_made_again(rank):
    partition, timeout = [[0, 1], [2, 3]], timedelta(minutes=3)
    group = rank_groups.make(partition, timeout)
    assert rank_groups.make(partition, timeout) is group is not rank_groups.make(partition)
    members(group)
    comm.destroy_process_group(group)
    with pytest.raises(RuntimeError, match="was destroyed; a group is made once"):
        rank_groups.make(partition, timeout)


@on_four_ranks
def sizes_that_are_set_are_what_the_getters_say(rank):
    groups.set_tensor_model_parallel_world_size(3), groups.set_tensor_model_parallel_rank(2)
    assert groups.get_model_parallel_world_size() == 3 and groups.get_tensor_model_parallel_rank() == 2
    groups.set_tensor_model_parallel_world_size(None), groups.set_tensor_model_parallel_rank(None)
    assert groups.get_tensor_model_parallel_world_size() == 1 and groups.get_model_parallel_rank() == 0


# As DeepSpeed 0.19.8 gives them: (world, tensor, experts, stages) -> groups, with experts first and with data first.
RECORDED = {
    (16, 2, 4, 1): (([[0, 2, 4, 6], [8, 10, 12, 14], [1, 3, 5, 7], [9, 11, 13, 15]],
                     [[0, 8], [2, 10], [4, 12], [6, 14], [1, 9], [3, 11], [5, 13], [7, 15]]),
                    ([[0, 4, 8, 12], [2, 6, 10, 14], [1, 5, 9, 13], [3, 7, 11, 15]],
                     [[0, 2], [4, 6], [8, 10], [12, 14], [1, 3], [5, 7], [9, 11], [13, 15]])),
    (16, 2, 2, 2): (([[0, 2], [4, 6], [1, 3], [5, 7], [8, 10], [12, 14], [9, 11], [13, 15]],
                     [[0, 4], [2, 6], [1, 5], [3, 7], [8, 12], [10, 14], [9, 13], [11, 15]]),
                    ([[0, 4], [2, 6], [1, 5], [3, 7], [8, 12], [10, 14], [9, 13], [11, 15]],
                     [[0, 2], [4, 6], [1, 3], [5, 7], [8, 10], [12, 14], [9, 11], [13, 15]])),
    (12, 1, 3, 2): (([[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]],
                     [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]),
                    ([[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]],
                     [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]])),
}


@pytest.mark.parametrize("sizes", RECORDED)
def test_expert_layouts_are_those_of_deepspeed(sizes):
    for data_first in (False, True):
        assert groups._get_expert_parallel_ranks(*sizes, data_first) == RECORDED[sizes][data_first]


@pytest.fixture
def without_default_group():
    """Tests that ran in this process before may have left one."""
    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()


def test_before_init_distributed_a_group_is_an_error_and_a_size_is_one(without_default_group):
    for getter in (groups._get_data_parallel_group, groups._get_data_parallel_world_size,
                   lambda: groups._get_expert_parallel_group("ep_size_2"),
                   lambda: groups._create_expert_and_data_parallel(2)):
        with pytest.raises(RuntimeError, match="no groups yet: call deepspeed.init_distributed"):
            getter()
    for getter, why in without_groups():
        with pytest.raises(RuntimeError, match=why):
            getter()
    assert groups.get_tensor_model_parallel_world_size() == groups._get_expert_model_parallel_world_size() == 1
    assert groups._get_sequence_parallel_rank() == 0 and groups._get_zero_param_intra_parallel_group() is None
    with pytest.raises(groups.DeprecatedException, match="takes ep_size itself"):
        groups.initialize(ep_size=2)


# ---- parallel states ----

# Kind of group -> (whether of the experts' grid, the dimensions along which its ranks differ).
KINDS = {"tensor_model": (False, "tp"), "pipeline_model": (False, "pp"), "model": (False, "tp-pp"),
         "data": (False, "dp"), "context": (False, "cp"), "sequence": (False, "sp"),
         "sequence_and_data": (False, "dp-cp-sp"), "sequence_data": (False, "dp-cp-sp"),
         "tensor_and_data": (False, "tp-dp"), "tensor_and_context": (False, "tp-cp"), "expert_model": (True, "ep"),
         "expert_tensor": (True, "tp"), "expert_data": (True, "dp")}


def check_all_groups(state, rank, **sizes):
    """Groups, sizes and ranks of every kind, by method and by function, against the table of csrc/topo.c."""
    grids = lay_out(4, sizes.pop("order", "tp-ep-dp-pp"), **sizes)
    with ps.set_current_parallel_state(state.name):
        for kind, (of_experts, dims) in KINDS.items():
            expected = grids[of_experts].group(rank, dims.split("-"))
            for source in (state, ps):
                group, size, own = (getattr(source, f"get_{kind}_parallel_{what}", lambda: None)()
                                    for what in ("group", "world_size", "rank"))
                assert members(group) == expected, kind
                assert kind.startswith("tensor_and_data") or (size, own) == (len(expected), expected.index(rank)), kind
            assert group is getattr(ps, f"get_{kind}_parallel_group")(name=state.name)


@on_four_ranks
def the_documented_example_lays_out_tensor_and_data_parallel_ranks(rank):
    config = {"train_micro_batch_size_per_gpu": 1, "tensor_parallel": {"autotp_size": 2}}
    assert not ps.is_initialized()
    state = ps.initialize_parallel_state_from_config(config)
    assert ps.is_initialized() and state is ps.get_parallel_state() is ps.get_parallel_state_instance()
    check_all_groups(state, rank, tensor=2)
    assert dist.get_process_group_ranks(state.get_data_parallel_group()) == [rank % 2, rank % 2 + 2]
    assert state.get_tensor_model_parallel_src_rank() == ps.get_tensor_model_parallel_src_rank() == rank // 2 * 2
    assert state.get_data_parallel_group_ranks() == [rank % 2, rank % 2 + 2]
    timeout = group_comm(state.get_data_parallel_group()), state.get_data_parallel_group()._get_backend(
        torch.device("cpu")).options._timeout
    assert timeout[0].size == 2 and timeout[1] == timedelta(minutes=30)
    layout = mpu_layout(state)
    assert (layout.data_ranks, layout.model_ranks) == ((rank % 2, rank % 2 + 2), (rank // 2 * 2, rank // 2 * 2 + 1))
    assert (layout.n_data, layout.data_rank, layout.tensor_size, layout.tensor_rank) == (2, rank // 2, 2, rank % 2)
    assert mpu_layout(ps) == layout and (layout.pipe_size, layout.pipe_rank) == (1, 0)
    parsed = Config({**config, "train_micro_batch_size_per_gpu": 3}, layout.n_data, layout.sizes)
    assert parsed.get("train_batch_size") == 6
    with pytest.raises(DeepSpeedConfigError, match="autotp_size is 4 and the mpu's is 2"):
        Config({**config, "tensor_parallel": {"autotp_size": 4}}, layout.n_data, layout.sizes)


@on_four_ranks
def an_instance_that_is_initialised_is_returned_as_it_is(rank):
    state = ps.get_parallel_state_instance()
    assert ps.initialize_parallel_state_from_config({"tensor_model_parallel_size": 4}) is state
    assert state.get_tensor_model_parallel_world_size() == 2
    with pytest.raises(RuntimeError, match="the parallel state is initialised already"):
        state.initialize_model_parallel()


@on_four_ranks
def named_instances_have_layouts_of_their_own(rank):
    actor = ps.initialize_parallel_state_from_config(
        Config({"train_batch_size": 4, "order": "tp-dp"}), "actor", expert_model_parallel_size=2, order="tp-ep-dp-pp")
    critic = ps.initialize_parallel_state_from_config(
        {"pipeline_model_parallel_size": 2, "sequence_parallel_size": 4.0, "data_parallel_size": 1,
         "virtual_pipeline_model_parallel_size": 3}, name="critic", sequence_parallel_size=2)
    check_all_groups(actor, rank, expert=2)
    check_all_groups(critic, rank, pipe=2, sequence=2)
    with ps.set_current_parallel_state("critic") as current:
        assert current is critic is ps.get_current_parallel_state() and ps.get_data_parallel_world_size() == 1
        with ps.set_current_parallel_state("actor"):
            assert ps.get_data_parallel_group() is dist.group.WORLD
        assert ps.get_virtual_pipeline_model_parallel_world_size() == 3
        ps.set_virtual_pipeline_model_parallel_rank(2)
        assert critic.get_virtual_pipeline_model_parallel_rank() == 2
    assert ps.get_data_parallel_world_size() == 2 and ps.get_data_parallel_world_size("actor") == 4
    again = ps.set_current_parallel_state("actor")
    for _ in range(2):
        with again as current:
            assert current is actor is ps.get_current_parallel_state()
        assert ps.get_current_parallel_state() is ps.get_parallel_state_instance()
    ps.set_current_parallel_state("actor")
    assert ps.get_current_parallel_state() is actor
    ps.set_current_parallel_state()
    assert ps.get_current_parallel_state() is ps.get_parallel_state_instance()
    ps.set_tensor_model_parallel_world_size(5, name="actor"), ps.set_tensor_model_parallel_rank(0, "actor")
    assert actor.get_tensor_model_parallel_world_size() == 5 and ps.get_tensor_model_parallel_world_size() == 2
    actor.set_tensor_model_parallel_world_size(None), actor.set_tensor_model_parallel_rank(None)
    assert mpu_layout(critic).sizes["sequence_parallel_size"] == 2 and mpu_layout(critic).n_data == 1


@on_four_ranks
def expert_getters_have_the_names_of_groups_too(rank):
    actor, start = ps.get_parallel_state("actor"), rank // 2 * 2
    for source, options in ((actor, {}), (ps, {"name": "actor"})):
        assert source._get_expert_parallel_group("ep_size_2", **options) is actor.get_expert_model_parallel_group()
        assert source._get_expert_parallel_group_ranks(**options) == [start, start + 1]
        assert source._get_expert_data_parallel_group_ranks(**options) == [rank % 2, rank % 2 + 2]
        assert source._get_expert_data_parallel_rank("ep_size_2", **options) == rank // 2
        assert source._get_expert_parallel_world_size(**options) == source._get_max_expert_size(**options) == 2
        assert source._get_expert_parallel_src_rank(**options) == start
        assert source._get_expert_broadcast_src_rank(**options) == rank % 2
        assert source._get_max_expert_size_name(**options) == "ep_size_2"
        assert source._get_expert_model_parallel_world_size(**options) == 1
        assert list(source._get_expert_parallel_group_dict(**options)) == ["ep_size_2"]
    with pytest.raises(RuntimeError, match="'actor' has no expert groups 'ep_size_4'; it has: ep_size_2"):
        actor._get_expert_parallel_group("ep_size_4")


@on_four_ranks
def context_parallel_groups_nested_and_with_data(rank):
    state = ps.initialize_parallel_state_from_config({"context_parallel_size": 2}, "context")
    check_all_groups(state, rank, context=2)
    assert dist.get_process_group_ranks(state.get_context_parallel_group()) == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert state.get_data_parallel_group(with_context_parallel=True) is dist.group.WORLD
    assert ps.get_data_parallel_world_size("context", True) == 4
    assert ps.get_data_parallel_rank(name="context", with_context_parallel=True, partial_data_parallel=False) == rank
    layout = mpu_layout(state)
    assert layout.data_ranks == (0, 1, 2, 3) and layout.n_data == 2 and layout.data_rank == rank // 2
    nested = ps.initialize_parallel_state_from_config({"context_parallel_size": 4}, "nested",
                                                      hierarchical_context_parallel_sizes=[2, 2])
    assert [members(group) for group in nested.get_hierarchical_context_parallel_groups()] == [
        [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]]


@on_four_ranks
def optimizer_instances_are_runs_of_the_data_ranks(rank):
    state = ps.initialize_parallel_state_from_config({"num_distributed_optimizer_instances": 2}, "parts")
    start = rank // 2 * 2
    assert members(state.get_data_parallel_group(True, True)) == [start, start + 1]
    assert members(state.get_expert_data_parallel_group(partial_expert_data_parallel=True)) == [start, start + 1]
    assert state.get_data_parallel_world_size(with_context_parallel=True, partial_data_parallel=True) == 2
    with pytest.raises(ValueError, match="with_context_parallel must be true"):
        state.get_data_parallel_group(partial_data_parallel=True)


@on_four_ranks
def layouts_that_cannot_be_are_errors_with_the_numbers(rank):
    def make(config, **options):
        return ps.initialize_parallel_state_from_config(config, "wrong", **options)

    for error, why, config, options in (
            (ValueError, "4 ranks do not divide by tensor x .* = 3 x 1 x 1 x 1", {"tensor_model_parallel_size": 3}, {}),
            (ValueError, "= 2 x 4 x 1 x 1", {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 4}),
            (ValueError, "autotp_size is 4 and tensor_model_parallel_size is 2",
             {"tensor_model_parallel_size": 2, "tensor_parallel": {"autotp_size": 4}}, {}),
            (ValueError, "data_parallel_size is 3; the other sizes leave 2 of 4 ranks",
             {"data_parallel_size": 3, "tensor_model_parallel_size": 2}, {}),
            (ValueError, "'tp-dp-tp' has 'tp' twice", {"order": "tp-dp-tp"}, {}),
            (ValueError, "allowed: tp, ep, dp", {"order": "tp-np"}, {}),
            (ValueError, "lacks 'pp', whose size is 2", {"pipeline_model_parallel_size": 2, "order": "tp-dp"}, {}),
            (ValueError, "tensor_model_parallel_size is 0", {}, {"tensor_model_parallel_size": 0}),
            (ValueError, "expert_tensor_parallel_size is 0", {}, {"expert_tensor_parallel_size": 0}),
            (TypeError, "context_parallel_size is 'two'", {}, {"context_parallel_size": "two"}),
            (ValueError, "interleaved stages need", {"virtual_pipeline_model_parallel_size": 2}, {}),
            (ValueError, r"\[2, 3\], whose product is 6", {"context_parallel_size": 4},
             {"hierarchical_context_parallel_sizes": [2, 3]}),
            (ValueError, "distributed_timeout_minutes is -1", {}, {"distributed_timeout_minutes": -1}),
            (ValueError, "instances is 3", {"num_distributed_optimizer_instances": 3}, {}),
            (NotImplementedError, "high_priority_stream_groups", {}, {"high_priority_stream_groups": ["dp"]}),
            (DeepSpeedConfigError, "tensor_modle_parallel_size", {"tensor_modle_parallel_size": 2}, {})):
        with pytest.raises(error, match=why):
            make(config, **options)
    assert not ps.is_initialized("wrong")
    with pytest.raises(RuntimeError, match="'wrong' has no data parallel group yet: call initialize_model_parallel"):
        ps.get_data_parallel_group("wrong")
    with pytest.raises(RuntimeError, match="no tensor model parallel group yet"):
        ps.get_tensor_model_parallel_world_size("wrong")


@on_four_ranks
def with_an_mpu_data_and_model_groups_are_its_own(rank):
    state = ps.get_parallel_state_instance()
    groups.mpu = state
    try:
        assert groups._get_data_parallel_group() is groups._get_sequence_data_parallel_group()
        assert groups._get_data_parallel_group_ranks() == [rank % 2, rank % 2 + 2]
        assert groups._get_data_parallel_world_size() == 2 and groups._get_broadcast_src_rank() == rank % 2
        assert groups.get_model_parallel_group() is groups.get_tensor_model_parallel_group()
        assert groups.get_model_parallel_world_size() == 2
        assert groups.get_tensor_model_parallel_src_rank() == rank // 2 * 2
        assert groups._get_sequence_parallel_world_size() == 1 and groups._get_sequence_parallel_rank() == 0
        assert dist.get_process_group_ranks(groups._get_sequence_parallel_group()) == [rank]
    finally:
        groups.mpu = None


@on_four_ranks
def experts_of_an_mpu_stay_among_its_data_ranks(rank):
    saved, mine = dict(groups._made().experts), [rank % 2, rank % 2 + 2]
    try:
        for mpu in (ps.get_parallel_state_instance(), ps, PipelineParallelGrid(PipeModelDataParallelTopology(1, 2, 2))):
            groups._made().experts.clear()
            groups._create_expert_data_and_model_parallel(2, mpu)
            groups._create_expert_data_and_model_parallel(1, mpu)
            assert members(groups._get_expert_parallel_group("ep_size_2")) == mine
            assert members(groups._get_expert_data_parallel_group("ep_size_2")) == [rank]
            assert groups._get_expert_parallel_group_ranks("ep_size_1") == [rank]
            assert groups._get_expert_data_parallel_group_ranks("ep_size_1") == mine
            assert groups._get_expert_model_parallel_world_size() == 2
        with pytest.raises(ValueError, match="ep_size 4 does not divide the 2 ranks over data of the mpu"):
            groups._create_expert_data_and_model_parallel(4, ps)
        far = ParallelState("far")  # tensor ranks 2 apart: only its own grid tells
        far.initialize_model_parallel(tensor_model_parallel_size=2, order="dp-tp")
        groups._made().experts.clear()
        groups._create_expert_data_and_model_parallel(2, far)
        assert groups._get_expert_parallel_group_ranks("ep_size_2") == [rank // 2 * 2, rank // 2 * 2 + 1]
        foreign = SimpleNamespace(**{name: getattr(far, name) for name in dir(far) if name.startswith("get_")})
        with pytest.raises(ValueError, match="would leave the mpu's data ranks"):
            groups._create_expert_data_and_model_parallel(2, foreign)
        stages = PipelineParallelGrid(ProcessTopology(["data", "pipe"], [2, 2]))  # stages next to each other
        with pytest.raises(ValueError, match=rf"copies on \[{rank // 2 * 2}, {rank // 2 * 2 + 1}\] would leave the"):
            groups._create_expert_data_and_model_parallel(1, stages)
    finally:
        groups._made().experts.clear()
        groups._made().experts.update(saved)


@on_four_ranks
def data_first_spreads_experts_over_distant_data_ranks(rank):
    saved = dict(groups._made().experts)
    try:
        for make in (lambda: groups._create_expert_and_data_parallel(2, use_data_before_expert_parallel_=True),
                     lambda: groups._create_expert_data_and_model_parallel(2, ps.get_parallel_state("actor"), True)):
            groups._made().experts.clear()
            make()
            assert groups._get_expert_parallel_group_ranks("ep_size_2") == [rank % 2, rank % 2 + 2]
            assert groups._get_expert_data_parallel_group_ranks("ep_size_2") == [rank // 2 * 2, rank // 2 * 2 + 1]
    finally:
        groups._made().experts.clear()
        groups._made().experts.update(saved)


# ---- other mpus ----

@on_four_ranks
def an_mpu_is_read_by_the_names_of_others(rank):
    data, model = groups._create_model_parallel(2)
    old = SimpleNamespace(get_model_parallel_group=lambda: model, get_model_parallel_world_size=lambda: 2,
                          get_model_parallel_rank=lambda: rank % 2, get_data_parallel_group=lambda: data,
                          get_data_parallel_world_size=lambda: 2, get_data_parallel_rank=lambda: rank // 2)
    layout = mpu_layout(old)
    assert (layout.data_ranks, layout.n_data, layout.data_rank) == ((rank % 2, rank % 2 + 2), 2, rank // 2)
    assert (layout.tensor_size, layout.tensor_rank, layout.sizes) == (2, rank % 2, {
        "tensor_model_parallel_size": 2})
    ulysses = SimpleNamespace(get_sequence_parallel_group=lambda: model, get_sequence_parallel_world_size=lambda: 2,
                              get_sequence_parallel_rank=lambda: rank % 2)
    layout = mpu_layout(ulysses)
    assert (layout.data_ranks, layout.n_data, layout.data_rank) == ((0, 1, 2, 3), 2, rank // 2)
    assert (layout.model_ranks, layout.sizes) == ((rank,), {"sequence_parallel_size": 2})
    grid = PipelineParallelGrid(PipeModelDataParallelTopology(2, 2, 1))
    layout = mpu_layout(grid)
    assert layout.model_ranks == (0, 1, 2, 3) and layout.data_ranks == (rank,) and layout.n_data == 1
    assert (layout.pipe_size, layout.pipe_rank, layout.tensor_rank) == (2, rank // 2, rank % 2)
    nothing = mpu_layout(None)
    assert nothing.data_ranks == (0, 1, 2, 3) and nothing.model_ranks == (rank,) and nothing.data_rank == rank
    assert nothing.n_data == 4 and nothing.sizes == {}


@on_four_ranks
def an_mpu_that_does_not_fit_together_is_an_error_with_the_numbers(rank):
    data, model = groups._create_model_parallel(2)
    for why, methods in (
            (r"2 tensor-parallel x 2 pipeline-parallel ranks and a model-parallel group of 2",
             {"tensor_model_parallel_world_size": 2, "pipeline_model_parallel_world_size": 2,
              "model_parallel_group": model}),
            ("model-parallel ranks and no get_data_parallel_group", {"model_parallel_world_size": 2,
                                                                      "model_parallel_group": model}),
            ("must meet in it only, and their numbers multiply to 4", {"model_parallel_world_size": 2,
                                                                      "model_parallel_group": model,
                                                                      "data_parallel_group": model}),
            ("3 ranks over data and 1 over sequence and context, and a group of 4 for both",
             {"data_parallel_world_size": 3, "data_parallel_group": dist.group.WORLD})):
        mpu = SimpleNamespace(**{f"get_{name}": lambda value=value: value for name, value in methods.items()})
        with pytest.raises(ValueError, match=why):
            mpu_layout(mpu)


# ---- topologies ----

# What DeepSpeed 0.19.8 says on 4 ranks, PipeModelDataParallelTopology(2, 1, 2): of ranks 1 and 3.
GRID = {1: {"get_stage_id": 0, "get_data_parallel_id": 1, "get_global_rank": 1, "get_pipe_parallel_rank": 0,
            "get_pipeline_model_parallel_rank": 0, "get_pipe_parallel_world_size": 2, "get_pipe_parallel_group": [1, 3],
            "get_data_parallel_rank": 1, "get_data_parallel_world_size": 2, "get_data_parallel_group": [0, 1],
            "get_data_parallel_group_ranks": [0, 1], "get_model_parallel_rank": 0, "get_model_parallel_world_size": 2,
            "get_model_parallel_group": [1, 3], "get_slice_parallel_rank": 0, "get_slice_parallel_world_size": 1,
            "get_slice_parallel_group": [1], "get_tensor_model_parallel_rank": 0,
            "get_tensor_model_parallel_world_size": 1},
        3: {"get_stage_id": 1, "get_data_parallel_id": 1, "get_global_rank": 3, "get_pipe_parallel_rank": 1,
            "get_pipeline_model_parallel_rank": 1, "get_pipe_parallel_group": [1, 3], "get_data_parallel_rank": 1,
            "get_data_parallel_group": [2, 3], "get_model_parallel_rank": 1, "get_model_parallel_group": [1, 3],
            "get_slice_parallel_group": [3], "get_tensor_model_parallel_rank": 0}}


@on_four_ranks
def a_pipeline_grid_says_what_deepspeeds_says(rank):
    grid = PipelineParallelGrid(PipeModelDataParallelTopology(2, 1, 2))
    for name, expected in GRID.get(rank, {}).items():
        found = getattr(grid, name)()
        found = dist.get_process_group_ranks(found) if isinstance(found, dist.ProcessGroup) else found
        assert found == expected, name
    if rank in (1, 3):
        assert [grid.stage_to_global(0), grid.stage_to_global(1), grid.stage_to_global(0, data=1)] == [1, 3, 1]
    plain = PipelineParallelGrid()
    assert plain.topology().get_dim("pipe") == plain.get_data_parallel_world_size() == 2
    with pytest.raises(ValueError, match="the topology has 8 ranks, and there are 4"):
        PipelineParallelGrid(PipeDataParallelTopology(2, 4))


def test_topologies_agree_with_brute_force_for_every_factorisation_of_up_to_64_ranks():
    for a, b, c in (dims for dims in itertools.product(range(1, 65), repeat=3) if math.prod(dims) <= 64):
        topology = ProcessTopology(["a", "b", "c"], [a, b, c])
        every = list(itertools.product(range(a), range(b), range(c)))
        assert topology.world_size() == len(every)
        assert [tuple(topology.get_coord(rank)) for rank in range(len(every))] == every
        for i, axis in enumerate("abc"):
            apart = {}
            for rank, at in enumerate(every):
                apart.setdefault((*at[:i], *at[i + 1:]), []).append(rank)
            assert topology.get_axis_comm_lists(axis) == [apart[rest] for rest in sorted(apart)]
            half = topology.get_dim(axis) // 2
            assert topology.get_axis_list(axis, half) == [rank for rank, at in enumerate(every) if at[i] == half]
        assert topology.filter_match(a=a - 1, c=0) == [r for r, at in enumerate(every) if at[::2] == (a - 1, 0)]
        assert topology.get_rank(a=a - 1, b=0, c=c - 1) == every.index((a - 1, 0, c - 1))


def test_a_topology_says_what_deepspeeds_says():
    topology = ProcessTopology(axes=["a", "b", "c"], dims=[2, 3, 2])
    assert topology.get_rank(a=1, b=2, c=0) == 10 and str(topology.get_coord(7)) == "ProcessCoord(a=1, b=0, c=1)"
    assert topology.get_axis_comm_lists("b") == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]
    assert topology.get_axis_comm_lists("x") == [] and topology.get_dim("q") == 0
    assert topology.filter_match(a=1, c=0) == [6, 8, 10] and topology.filter_match(a=7) == []
    assert topology.get_rank_repr(7) == "a_01-b_00-c_01" and topology.get_rank_repr(7, ["a"]) == "b_00-c_01"
    assert topology.get_rank_repr(7, omit_axes=["a", "b"], inner_sep="+", outer_sep="/") == "c+01"
    assert topology.get_axis_names() == ["a", "b", "c"] and topology.mapping[topology.get_coord(5)] == 5
    assert PipeModelDataParallelTopology(2, 2, 2).get_axis_names() == ["pipe", "data", "model"]
    assert PipeModelDataParallelTopology(2, 2, 2).get_axis_comm_lists("pipe") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert PipeModelDataParallelTopology(2, 2, 2).get_rank_repr(3) == "model_01"
    for wrong, why in ((lambda: topology.get_rank(a=1), "it needs each of"),
                       (lambda: topology.get_coord(12), "rank 12"),
                       (lambda: topology.get_rank(a=5, b=0, c=0), "a is 5; allowed: 0 to 1"),
                       (lambda: topology.filter_match(z=1), "axis 'z'"),
                       (lambda: ProcessTopology(["a"], [2, 2]), "1 names and 2 sizes"),
                       (lambda: ProcessTopology(["a"], [0]), "'a' has size 0")):
        with pytest.raises(ValueError, match=why):
            wrong()


# ---- interfaces ----

def test_signatures_are_the_documented_ones(without_default_group):
    documented = (
        "config name tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size "
        "pipeline_model_parallel_comm_backend context_parallel_size hierarchical_context_parallel_sizes "
        "expert_model_parallel_size num_distributed_optimizer_instances expert_tensor_parallel_size "
        "sequence_parallel_size nccl_communicator_config_path distributed_timeout_minutes order "
        "create_gloo_process_groups high_priority_stream_groups").split()
    assert list(inspect.signature(ps.initialize_parallel_state_from_config).parameters) == documented
    for kind in ("tensor_model", "model", "data", "pipeline_model", "context", "sequence", "sequence_and_data"):
        for what in ("group", "world_size", "rank"):
            name = f"get_{kind}_parallel_{what}"
            assert callable(getattr(ParallelState, name)) and getattr(ps, name).__doc__, name
    state = ParallelState()
    assert not state.is_initialized()
    for name in dir(state):
        if name.startswith(("get_", "_get_")):
            with pytest.raises(RuntimeError, match=r"the parallel state has no .* group yet: call"):
                getattr(state, name)()
    with pytest.raises(RuntimeError, match="call deepspeed.init_distributed"):
        state.initialize_model_parallel()


def test_a_world_of_one_is_every_group(ranks):
    ranks(1, world_of_one)


def world_of_one(rank, world):
    deepspeed.init_distributed()
    state = ps.initialize_parallel_state_from_config({})
    for kind in KINDS:
        assert getattr(state, f"get_{kind}_parallel_group")() is dist.group.WORLD
    groups._create_expert_and_data_parallel(1)
    assert groups._get_expert_parallel_group("ep_size_1") is dist.group.WORLD
    deepspeed.comm.destroy_process_group()
    assert not state.is_initialized()
    with pytest.raises(RuntimeError, match="no groups yet"):
        groups._get_expert_parallel_group("ep_size_1")
    deepspeed.init_distributed()
    assert groups._get_expert_parallel_group_dict() == {} and not ps.is_initialized()
    assert ps.initialize_parallel_state_from_config({}).get_data_parallel_world_size() == 1


def diverges(rank, world):
    deepspeed.init_distributed()
    with pytest.raises(deepspeed.CommError, match=r"2 groups like \[0\] #"):
        ParallelState().initialize_model_parallel(distributed_timeout_minutes=1 + rank)


def test_ranks_that_ask_for_different_groups_are_told_so(ranks):
    ranks(2, diverges)


def test_a_grid_checks_what_it_is_given():
    grid = Grid(("x", "y"), (2, 3))
    assert grid.names == ("x", "y") and grid.sizes == (2, 3) and grid.n_ranks == math.prod(grid.sizes)
    for error, wrong in ((ValueError, lambda: grid.group(6, ["x"])), (ValueError, lambda: grid.group(-1, ["x"])),
                         (ValueError, lambda: grid.groups(["z"])), (ValueError, lambda: grid.groups(["x"], 0)),
                         (ValueError, lambda: grid.groups(["x", "y"], 4)), (TypeError, lambda: grid.groups([1])),
                         (TypeError, lambda: grid.groups(1)), (ValueError, lambda: grid.rank((1,))),
                         (ValueError, lambda: grid.rank((1, 3))), (TypeError, lambda: grid.rank(("a", 0))),
                         (TypeError, lambda: grid.coordinates("a")), (ValueError, lambda: grid.coordinates(6)),
                         (TypeError, lambda: Grid(("x",), (1.5,))), (OverflowError, lambda: Grid(("x",), (1 << 64,))),
                         (ValueError, lambda: Grid(("x\ud800",), (1,))),
                         (ValueError, lambda: Grid(range(17), range(17))),
                         (ValueError, lambda: lay_out(4, "tp", pipe=-1)), (TypeError, lambda: lay_out(4, None))):
        with pytest.raises(error):
            wrong()
    assert grid.groups(["x", "y"], 3, across=True) == [[0, 2, 4], [1, 3, 5]]
    assert grid.groups([]) == [[rank] for rank in range(6)]


# ---- the results of four ranks ----

@pytest.mark.parametrize("name", CHECKS)
def test_on_four_ranks(four, name):
    assert not any(name in said for said in four), "\n".join(said[name] for said in four if name in said)
