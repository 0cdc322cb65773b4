"""The interface as scripts use it: arguments, returns, errors (contract F1), life and end of an engine."""
import argparse
import copy
import gc
import inspect
import json

import models
import pytest
import torch
import torch.nn as nn

import deepspeed_c as deepspeed

CONFIG = {"train_batch_size": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def start(config=CONFIG, module=None, **more):
    module = module or net()
    more.setdefault("model_parameters", module.parameters())
    return deepspeed.initialize(model=module, config=config, **more)


def one_step(engine):
    loss = engine(torch.ones(2, 4)).square().mean()
    engine.backward(loss)
    engine.step()
    return loss.item()


# ---- wrong arguments: the text names what came and what is allowed ----


def test_without_a_model_the_error_says_so():
    with pytest.raises(ValueError, match="requires a model"):
        deepspeed.initialize(config=CONFIG)


def test_without_or_with_two_configurations_the_error_says_so(tmp_path):
    with pytest.raises(ValueError, match="no configuration"):
        deepspeed.initialize(model=net())
    args = argparse.Namespace(deepspeed_config=str(tmp_path / "x.json"))
    with pytest.raises(ValueError, match="two configurations"):
        deepspeed.initialize(args=args, model=net(), config=CONFIG)


@pytest.mark.parametrize("change, text", [
    ({"gradient_clipp1ng": 1}, "gradient_clipping"),
    ({"train_batch_size": 0}, "train_batch_size"),
    ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage"),
    ({"zero_optimization": {"stagee": 1}}, "zero_optimization.stage"),
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16"),
    ({"sparse_gradients": True}, "sparse_gradients"),
])
def test_a_wrong_configuration_names_the_key(change, text):
    with pytest.raises((deepspeed.DeepSpeedConfigError, NotImplementedError), match=text):
        start({**CONFIG, **change})


@pytest.mark.parametrize("section, error, text", [
    ({"type": "AdamW", "params": {"learning_rate": 1}}, ValueError, "learning_rate"),
    ({"type": "AdamW", "params": {"max_grad_norm": 1}}, ValueError, "gradient_clipping"),
    ({"type": "AdamW", "params": {"lr": "fast"}}, ValueError, "optimizer.params.lr is 'fast'; allowed: a number"),
    ({"type": "AdamW", "params": {"betas": [0.9]}}, ValueError, "optimizer.params.betas.*two numbers"),
    ({"type": "SGD", "params": {"nesterov": "yes"}}, ValueError, "optimizer.params.nesterov.*true or false"),
    ({"type": "Adam", "params": {"amsgrad": True}}, NotImplementedError, "amsgrad"),
])
def test_a_wrong_optimizer_parameter_names_it(section, error, text):
    with pytest.raises(error, match=text):
        start({**CONFIG, "optimizer": section})


def test_not_yet_is_an_error_everywhere():
    with pytest.raises(TypeError, match="mpu is object"):
        start(mpu=object())
    with pytest.raises(NotImplementedError, match="mesh_param"):
        start(mesh_param=(1, 1))


def test_parameters_given_twice_are_named():
    module = net()
    with pytest.raises(ValueError, match="more than once.*0.weight"):
        start(module=module, model_parameters=[module[0].weight, module[0].weight])


def test_backward_needs_one_element_and_a_graph():
    engine, *_ = start()
    with pytest.raises(ValueError, match="one element"):
        engine.backward(engine(torch.ones(2, 4)))
    with pytest.raises(ValueError, match="grad_fn"):
        engine.backward(torch.tensor(1.0))


def test_a_parameter_that_changed_its_size_is_named():
    engine, *_ = start()
    loss = engine(torch.ones(2, 4)).square().mean()
    engine.backward(loss)
    engine.module[0].bias.grad = None
    engine.module[0].bias.data = torch.zeros(3)
    with pytest.raises(ValueError, match="0.bias changed since initialize"):
        engine.step()


@pytest.mark.parametrize("section", [
    {"optimizer": {"type": "AdamW", "params": {"nonsense": 1}}}, {"optimizer": {"type": "Muon"}},
    {"optimizer": {"type": "AdamW", "params": {"lr": -1}}},
    {"optimizer": {"type": "Lion", "params": {"betas": [1, 0]}}},
    {"scheduler": {"type": "warmupLR"}}, {"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 1}}},
    {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}},
    {"scheduler": {"type": "ConstantLR", "params": {"factor": 2.0}}},
], ids=str)
def test_a_wrong_setting_leaves_the_module_as_it_was(section):
    check_refused({**CONFIG, "bf16": {"enabled": True}, **section})


@pytest.mark.parametrize("argument", [
    {"lr_scheduler": 3}, {"lr_scheduler": lambda optimizer: optimizer.no_such_thing}, {"training_data": 3},
    {"training_data": []}, {"optimizer": 3},
], ids=str)
def test_a_wrong_argument_leaves_the_module_as_it_was(argument):
    check_refused({**CONFIG, "bf16": {"enabled": True}}, **argument)


def check_refused(config, **arguments):
    module = net()
    before = models.bits(module)
    with pytest.raises((ValueError, TypeError, AttributeError, NotImplementedError)):
        start(config, module, **arguments)
    assert models.bits(module) == before and module[0].weight.dtype == torch.float32


def test_what_is_no_module_is_refused_by_its_type():
    with pytest.raises(TypeError, match="model is int; allowed: a torch.nn.Module"):
        deepspeed.initialize(model=3, config=CONFIG)


def test_a_group_that_asks_for_what_is_not_there_says_so():
    module = net()
    with pytest.raises(NotImplementedError, match="group 0: maximize"):
        start(module=module, model_parameters=[{"params": list(module.parameters()), "maximize": True}])


def test_parameters_that_overlap_in_memory_off_alignment_are_named():
    module = net()
    base = torch.zeros(40)
    module[0].bias.data = base[:8]
    module[2].bias.data = base[3:5]
    with pytest.raises(ValueError, match="0.bias and 2.bias share memory"):
        start(module=module)


def test_step_hooks_of_the_optimizer_run():
    engine, optimizer, *_ = start()
    seen = []
    optimizer.register_step_pre_hook(lambda *args: seen.append("pre"))
    optimizer.optimizer.register_step_post_hook(lambda *args: seen.append("post"))
    one_step(engine)
    assert seen == ["pre", "post"]


# ---- shapes of arguments that clients pass ----


def test_configuration_as_dict_file_text_and_args(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(CONFIG))
    losses = []
    for given in (CONFIG, str(path), json.dumps(CONFIG)):
        losses.append(one_step(start(given)[0]))
    losses.append(one_step(start(None, config_params=CONFIG)[0]))
    losses.append(one_step(start(None, args=argparse.Namespace(deepspeed_config=str(path), local_rank=0))[0]))
    assert len(set(losses)) == 1


def test_model_parameters_as_none_list_iterator_groups():
    results = []
    for make in (lambda m: None, lambda m: list(m.parameters()), lambda m: iter(m.parameters()),
                 lambda m: [{"params": m.parameters()}], lambda m: filter(lambda p: p.requires_grad, m.parameters()),
                 lambda m: [{"params": m[0].parameters()}, {"params": m[2].parameters()}, {"params": []}]):
        module = net()
        engine, optimizer, *_ = start(module=module, model_parameters=make(module))
        one_step(engine)
        results.append(models.bits(module))
        assert sum(len(g["params"]) for g in optimizer.param_groups) == 4
    assert len(set(results)) == 1


def test_the_callers_dict_comes_back_as_engine_config():
    given = copy.deepcopy(CONFIG)
    engine, *_ = start(given)
    assert engine.config is given and given == CONFIG


def test_add_config_arguments_leaves_local_rank_to_the_script():
    parser = argparse.ArgumentParser()
    assert deepspeed.add_config_arguments(parser) is parser
    parser.add_argument("--local_rank", type=int, default=-1)
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", "x.json"])
    assert args.deepspeed and args.deepspeed_config == "x.json" and args.local_rank == -1


def test_engine_is_a_module_and_falls_through_to_the_callers_own():
    module = net()
    module.answer = 42
    engine, *_ = start(module=module)
    assert isinstance(engine, nn.Module) and type(engine) is deepspeed.DeepSpeedEngine
    assert engine.module is module and engine.answer == 42
    assert len(list(engine.parameters())) == 4
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = engine.nothing_such


def test_a_replaced_forward_is_called():
    engine, *_ = start()
    engine.module.forward = lambda x: x * 7
    assert engine(torch.ones(1)).item() == 7


def test_accessors_come_from_the_table_and_are_inspectable():
    engine, *_ = start({**CONFIG, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}})
    assert engine.bfloat16_enabled() and not engine.fp16_enabled()
    assert engine.zero_optimization_stage() == 1 and engine.gradient_clipping() == 1.0
    assert (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu(),
            engine.gradient_accumulation_steps()) == (2, 2, 1)
    inspect.signature(engine.fp16_enabled)
    inspect.signature(engine.save_checkpoint)


def test_answers_that_follow_from_several_keys():
    engine, *_ = start({**CONFIG, "fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 3},
                        "zero_optimization": {"stage": 2}})
    assert engine.zero_optimization() and engine.zero_optimization_partition_gradients()
    assert not engine.zero_optimization_partition_weights() and not engine.zero_use_cpu_optimizer()
    assert engine.communication_data_type == torch.float16 and engine.postscale_gradients()
    assert engine.get_data_types() == (torch.float16, torch.float32)
    assert engine.dynamic_loss_scale_args() == {"init_scale": 16, "scale_window": 1000, "delayed_shift": 3,
                                                "consecutive_hysteresis": False, "min_scale": 1}
    assert (engine.get_data_parallel_rank(), engine.get_model_parallel_rank()) == (0, 0)
    plain, *_ = start({**CONFIG, "communication_data_type": "bf16", "prescale_gradients": True})
    assert not plain.zero_optimization() and plain.communication_data_type == torch.bfloat16
    other, *_ = start({**CONFIG, "communication_data_type": "bfp16"})
    assert other.communication_data_type == torch.bfloat16
    assert plain.dynamic_loss_scale_args() is None and not plain.postscale_gradients()


def test_documented_methods_that_are_not_there_say_so():
    engine, *_ = start()
    for name in ("compile", "clip_fp32_gradients", "sparse_allreduce_bucket"):
        with pytest.raises(NotImplementedError, match=f"engine.{name}.. is not yet"):
            getattr(engine, name)()


def test_the_optimizer_is_an_ordinary_class_whose_class_can_be_changed():
    engine, optimizer, *_ = start()
    inner = type("Wrapped", (type(optimizer),), {})
    optimizer.__class__ = inner
    assert isinstance(optimizer, torch.optim.Optimizer) and isinstance(optimizer.optimizer, torch.optim.Optimizer)
    assert optimizer.optimizer.param_groups is optimizer.param_groups
    one_step(engine)


def test_optimizer_step_applies_what_backward_left():
    a, b = net(), net()
    engine, optimizer, *_ = start(module=a)
    other, *_ = start(module=b)
    loss = engine(torch.ones(2, 4)).square().mean()
    engine.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    one_step(other)
    assert models.bits(a) == models.bits(b)


def test_boundary_can_be_set_by_hand_and_counted():
    engine, *_ = start({**CONFIG, "train_batch_size": 6, "gradient_accumulation_steps": 3})
    seen = []
    for _ in range(6):
        seen.append(engine.is_gradient_accumulation_boundary())
        one_step(engine)
    assert seen == [False, False, True] * 2
    assert (engine.global_steps, engine.micro_steps, engine.global_samples) == (2, 6, 12)
    engine.set_gradient_accumulation_boundary(is_boundary=True)
    one_step(engine)
    assert engine.global_steps == 3
    engine.set_gradient_accumulation_boundary(is_boundary=False)
    one_step(engine)
    assert engine.global_steps == 3 and not engine.was_step_applied()


def test_gas_with_manual_boundary_equals_counting():
    results = []
    for manual in (False, True):
        module = net()
        engine, *_ = start({**CONFIG, "train_batch_size": 4, "gradient_accumulation_steps": 2}, module)
        for i in range(4):
            loss = engine(torch.full((2, 4), float(i))).square().mean()
            if manual:
                engine.set_gradient_accumulation_boundary(is_boundary=i % 2 == 1)
            engine.backward(loss)
            if not manual or i % 2 == 1:
                engine.step()
        results.append(models.bits(module))
    assert results[0] == results[1]


def test_no_sync_accumulates_and_refuses_step():
    engine, *_ = start()
    with engine.no_sync():
        engine.backward(engine(torch.ones(2, 4)).square().mean())
        with pytest.raises(RuntimeError, match="no_sync"):
            engine.step()
    one_step(engine)
    assert engine.global_steps == 1
    other, *_ = start({**CONFIG, "zero_optimization": {"stage": 2}})
    with pytest.raises(RuntimeError, match="stage 2"):
        with other.no_sync():
            pass


def test_backward_returns_the_loss_divided_by_accumulation():
    engine, *_ = start({**CONFIG, "train_batch_size": 4, "gradient_accumulation_steps": 2})
    loss = engine(torch.ones(2, 4)).square().mean()
    assert engine.backward(loss).item() == loss.item() / 2
    loss = engine(torch.ones(2, 4)).square().mean()
    assert engine.backward(loss, scale_wrt_gas=False).item() == loss.item()


def test_without_an_optimizer_the_engine_only_runs_forward():
    module = net()
    engine, optimizer, loader, scheduler = deepspeed.initialize(model=module, config={"train_batch_size": 2})
    assert (optimizer, loader, scheduler) == (None, None, None)
    assert engine(torch.ones(2, 4)).shape == (2, 2)
    with pytest.raises(RuntimeError, match="needs an optimizer"):
        engine.backward(engine(torch.ones(2, 4)).sum())


def test_the_scheduler_can_be_an_object_a_callable_or_taken_away():
    schedule = start(lr_scheduler=lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 0.5))[3]
    assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
    engine, optimizer, *_ = start()
    engine.lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    one_step(engine)
    assert engine.get_lr() == [pytest.approx(1e-4)]
    engine.lr_scheduler = None
    one_step(engine)
    assert engine.get_lr() == [pytest.approx(1e-4)]


def test_zero_contexts_on_ordinary_parameters_do_nothing():
    with deepspeed.zero.Init(enabled=False):
        module = net()
    with deepspeed.zero.GatheredParameters([module[0].weight, None, *module.buffers()], modifier_rank=0):
        assert module[0].weight.shape == (8, 4)


# ---- life and end ----


def test_destroy_leaves_parameters_usable_and_is_idempotent():
    module = net()
    engine, optimizer, *_ = start(module=module)
    one_step(engine)
    before = models.bits(module)
    engine.destroy()
    engine.destroy()
    assert engine.loss_scale() == optimizer.loss_scale == optimizer.cur_scale == 1.0 and not optimizer.overflow
    assert models.bits(module) == before
    assert copy.deepcopy(module)(torch.ones(1, 4)).shape == (1, 2)
    with pytest.raises(RuntimeError, match="destroyed"):
        engine.step()


def test_an_optimizer_that_outlives_its_engine_says_what_happened():
    engine, optimizer, *_ = start()
    one_step(engine)
    engine.destroy()
    del engine, _
    gc.collect()
    optimizer.zero_grad()
    assert optimizer.loss_scale == 1.0 and not optimizer.overflow and len(optimizer.param_groups[0]["params"]) == 4
    loss = torch.zeros(1, requires_grad=True).sum()
    for call in (optimizer.step, optimizer.state_dict, lambda: optimizer.load_state_dict({}),
                 lambda: optimizer.backward(loss), lambda: optimizer.state_names):
        with pytest.raises(RuntimeError, match="engine was destroyed.*call initialize again"):
            call()


def test_parameters_keep_storages_of_their_own(tmp_path):
    module = net()
    engine, *_ = start(module=module)
    one_step(engine)
    torch.save(module.state_dict(), tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 8000
    assert len({p.untyped_storage().data_ptr() for p in module.parameters()}) == 4


def trained_with(change, rank, stage, overlap, dtype):
    """Bits after steps of one and of two micro-steps; change(module, i) comes before forward pass i."""
    module = net()
    config = {**CONFIG, "train_batch_size": 4, "zero_optimization": {"stage": stage, "overlap_comm": overlap}}
    engine, optimizer, *_ = start(config if dtype == "fp32" else {**config, dtype: {"enabled": True}}, module)
    for i in range(6):
        change(module, i)
        x = torch.full((2, 4), 1.0 + i + rank, dtype=module[0].weight.dtype)
        engine.set_gradient_accumulation_boundary(i not in (2, 4))
        engine.backward(engine(x).square().mean())
        engine.step()
    assert all(a is b for a, b in zip((p for g in optimizer.param_groups for p in g["params"]), module.parameters()))
    assert engine._core.early == (overlap or stage == 2) and set(optimizer.state) <= set(module.parameters())
    return models.bits(module)


def assigned(module, i):
    if i in (1, 3, 5):
        values = {k: v.clone() for k, v in module.state_dict().items()}
        module.load_state_dict(values, assign=True)


def placed(module, i):
    if i in (1, 3):
        module[0].weight = nn.Parameter(module[0].weight.detach().t().clone().t())  # in another memory order
        module[2] = copy.deepcopy(module[2])


def lent(module, i):
    """A Parameter that another engine, which still is there, trained until now."""
    if i == 3:
        lender = copy.deepcopy(module)
        config = {**CONFIG, "train_batch_size": 4, "zero_optimization": {"stage": 2}}
        bf16 = module[0].weight.dtype == torch.bfloat16
        module.other = lambda: engine  # keeps it
        engine, *_ = start({**config, "bf16": {"enabled": True}} if bf16 else config, lender)
        module[0].weight = lender[0].weight


def replaces(rank, world):
    torch.set_num_threads(1)
    return {setting: [trained_with(change, rank, *setting) for change in (lambda *_: None, assigned, placed, lent)]
            for setting in ((0, False, "fp32"), (1, True, "fp32"), (1, False, "bf16"), (2, False, "bf16"))}


def test_a_parameter_in_the_place_of_another_is_trained_on(ranks):
    for setting, (expected, *others) in ranks(2, replaces)[1].items():
        assert others == [expected] * 3, setting


def test_a_parameter_in_the_place_of_another_of_a_foreign_optimizer_is_trained_on():
    results = []
    for change in (lambda *_: None, assigned):
        module = net()
        engine, *_ = start({k: v for k, v in CONFIG.items() if k != "optimizer"}, module,
                           optimizer=torch.optim.RMSprop(module.parameters(), lr=1e-2, momentum=0.9))
        for i in range(4):
            change(module, i)
            one_step(engine)
        results.append(models.bits(module))
    assert results[0] == results[1]


def replace_shape(module):
    module[2].bias = nn.Parameter(torch.zeros(3))


def replace_dtype(module):
    module.load_state_dict({k: v.to(torch.bfloat16) for k, v in module.state_dict().items()}, assign=True)


def take_away(module):
    module[2].bias = None


def tie(module):
    module[2].bias = module[0].bias


def wrap(module):
    module[2] = nn.Sequential(module[2])
    module[2].weight = nn.Parameter(torch.zeros(2, 8))


@pytest.mark.parametrize("change, text", [
    (replace_shape, r"2.bias was replaced by one that does not fit: \(3,\).*allowed: \(2,\)"),
    (replace_dtype, r"0.weight was replaced.*bfloat16.*allowed: .*float32"),
    (take_away, "2.bias, which the engine trains, is not in the module any more"),
    (tie, "2.bias is the same object as 0.bias"),
    (wrap, r"2.weight still is in the module.*places \(2.weight\)"),
])
def test_what_cannot_take_a_parameters_place_is_an_error_that_names_it(change, text):
    module = net()
    engine, *_ = start(module=module)
    one_step(engine)
    before, kept = models.bits(module), list(engine._params)
    x = torch.ones(2, 4, dtype=torch.float32)
    loss = module(x).square().mean()
    change(module)
    for _ in range(2):  # and again: nothing was half taken
        with pytest.raises(ValueError, match=text):
            engine.backward(loss)
    assert all(a is b for a, b in zip(engine._params, kept)) and b"".join(
        p.detach().numpy().tobytes() for p in kept) == before


def test_a_parameter_that_stood_in_two_places_must_be_replaced_in_both():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    engine, *_ = start(module=module)
    one_step(engine)
    module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match="0.weight is another object in each of its places.*tie them again"):
        one_step(engine)
    module[1].weight = module[0].weight
    one_step(engine)
    assert len(engine._params) == 3 and engine._params[0] is module[1].weight


def test_a_wrapped_module_is_trained_on():
    module = net()
    engine, *_ = start(module=module)
    module[2] = nn.Sequential(module[2])
    before = module[2][0].weight.detach().clone()
    one_step(engine)
    assert not torch.equal(module[2][0].weight, before)


def test_an_engine_that_is_dropped_is_collected():
    import weakref
    engine, *_ = start()
    one_step(engine)
    seen = weakref.ref(engine)
    del engine, _
    gc.collect()
    assert seen() is None


def test_replaced_storage_is_found_again():
    module = net()
    engine, *_ = start(module=module)
    one_step(engine)
    module[0].weight.data = module[0].weight.data.clone()
    module[2].weight.share_memory_()
    before = models.bits(module)
    one_step(engine)
    assert models.bits(module) != before


def test_numpy_integers_floats_and_auto_in_the_configuration():
    engine, *_ = start({**CONFIG, "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8},
                        "gradient_clipping": "auto", "steps_per_print": float("inf"),
                        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": 1e-8}}})
    assert engine.gradient_clipping() == 1.0 and engine.get_lr() == [1e-3]
    one_step(engine)
