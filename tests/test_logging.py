"""The logger: which ranks speak, what the level silences, nothing on stdout."""
import logging

import pytest
import torch

import deepspeed_c
from deepspeed_c.utils import logging as ds_logging
from deepspeed_c.utils.logging import logger


@pytest.fixture
def lines():
    """(level, message) of what the logger's handlers were given; the level is put back."""
    seen, level = [], logger.level
    handler = logging.Handler()
    handler.emit = lambda record: seen.append((record.levelname, record.getMessage()))
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_only_the_named_ranks_speak(lines, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    for ranks in (None, [], [-1], [1, 2], [0]):
        ds_logging.log_dist(f"to {ranks}", ranks=ranks, level=logging.ERROR)
    assert lines == [("ERROR", f"[Rank 2] to {ranks}") for ranks in (None, [], [-1], [1, 2])]


def test_a_percent_sign_in_a_message_is_text(lines):
    ds_logging.log_dist("100 %s", level=logging.ERROR)
    assert lines == [("ERROR", "[Rank 0] 100 %s")]


def test_the_level_silences_events_but_not_what_was_asked_for(lines, capfd):
    ds_logging.log_dist("an event")
    ds_logging.print_rank_0("a detail", debug=True)
    ds_logging.print_dist("a time")
    ds_logging.print_rank_0("a time too", force=True)
    assert lines == [("INFO", "[Rank 0] a time"), ("INFO", "[Rank 0] a time too")]
    assert capfd.readouterr().out == ""


def test_once_is_once_per_message(lines):
    for _ in range(2):
        ds_logging.log_dist_once("once a", ranks=[0], level=logging.ERROR)
        ds_logging.warning_once("once b")
    ds_logging.log_dist_once("once c", level=logging.ERROR)
    assert [message for _, message in lines] == ["[Rank 0] once a", "once b", "[Rank 0] once c"]


def test_the_level_goes_by_name_and_a_wrong_name_is_an_error(lines):
    ds_logging.set_log_level_from_string("INFO")
    assert ds_logging.get_current_level() == logging.INFO
    assert ds_logging.should_log_le("info") and not ds_logging.should_log_le("debug")
    ds_logging.log_dist("an event")
    assert lines == [("INFO", "[Rank 0] an event")]
    with pytest.raises(ValueError, match="'loud' is not one of debug, info"):
        ds_logging.set_log_level_from_string("loud")
    other = logging.getLogger("another")
    ds_logging.set_log_level_from_string("error", other)
    assert other.level == logging.ERROR and ds_logging.get_current_level() == logging.INFO


def test_the_configuration_can_set_the_level(lines):
    config = {"train_batch_size": 1, "log_level": "INFO"}
    engine = deepspeed_c.initialize(model=torch.nn.Linear(1, 1), config=config)[0]
    assert engine.log_level() == "info" and ds_logging.get_current_level() == logging.INFO
    assert any("DeepSpeed info" in message for _, message in lines)
    with pytest.raises(ValueError, match='log_level is "loud"'):
        deepspeed_c.initialize(model=torch.nn.Linear(1, 1), config={**config, "log_level": "loud"})
    deepspeed_c.initialize(model=torch.nn.Linear(1, 1), config={"train_batch_size": 1})
    assert ds_logging.get_current_level() == logging.INFO
