import pytest

from kappa_lightning.processes import Processes


def test_process_alone_hears_only_itself():
    alone = Processes()
    assert alone.gather(3) == [3]
    assert alone.broadcast("x") == "x"
    assert alone.local_world_size() == 1
    assert alone.is_global_zero


def test_error_of_a_process_alone_passes_as_it_is():
    with pytest.raises(KeyError, match="weight"), Processes().failing_together():
        raise KeyError("weight")


def test_without_a_process_group_this_run_is_one_process():
    assert Processes.of_this_run() == Processes(rank=0, world_size=1)


def test_processes_of_one_machine_are_those_with_its_name(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "b")
    monkeypatch.setattr(Processes, "gather", lambda self, value: ["a", value, "a", value, value])
    assert Processes(rank=1, world_size=5).local_world_size() == 3
