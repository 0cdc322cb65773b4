"""Groups of ranks by what is parallel: expert groups, parallel states, topologies, and what an mpu says.

Which ranks form a group is arithmetic, tested against brute force in tests/c/test_topo.c; here it is whether torch's
groups, and our collectives over them, are over those ranks, and what is said where something is not there. What needs
four ranks runs in one start of four processes.
"""
import traceback

import pytest
import torch
import torch.distributed as dist

import deepspeed_c as deepspeed
from deepspeed_c import comm
from deepspeed_c.utils import groups


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
        except Exception:
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


def test_before_init_distributed_a_group_is_an_error_and_a_size_is_one():
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


# ---- the results of four ranks ----

@pytest.mark.parametrize("name", CHECKS)
def test_on_four_ranks(four, name):
    assert not any(name in said for said in four), "\n".join(said[name] for said in four if name in said)
