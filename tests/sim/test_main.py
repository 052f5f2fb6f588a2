"""The command: arguments, output, exit status."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pexpect
import pytest

from raftkv.sim.check.history import History
from raftkv.sim.main import FIELDS, main
from raftkv.sim.nemesis import Nemesis, check_faults
from raftkv.sim.scenario import ScenarioError, load, names, parse
from tests.sim.ablations import duplicate_applied

pytestmark = pytest.mark.timeout(400)


def test_a_line_of_json_a_seed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--seeds", "1..2", "--scenario", "calm", "--virtual-seconds", "3", "-o", "json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["seed"] for line in lines] == [1, 2]
    for line in lines:
        assert set(line) == set(FIELDS)
        assert line["verdict"] == "passed"
        assert len(line["trace_hash"]) == 32
        assert line["virtual_seconds"] >= 3


def test_text_ends_with_the_probes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "history"
    assert main(["--seed", "1", "--scenario", "calm", "--virtual-seconds", "3", "--history", str(path)]) == 0
    out = capsys.readouterr().out
    assert "seed 1: passed" in out
    assert "probes hit: " in out and "group formed" in out
    assert "probes never hit: " in out and "snapshot installed" in out
    assert len(History.read(path)) > 10


def test_a_bar_on_a_terminal() -> None:
    arguments = ["-m", "raftkv.sim", "--seeds", "1..3", "--scenario", "calm", "--virtual-seconds", "2"]
    environment = {**os.environ, "TERM": "xterm"}
    terminal = pexpect.spawn(sys.executable, arguments, timeout=300, encoding="utf-8", env=environment)
    shown = str(terminal.read())
    terminal.close()
    assert terminal.exitstatus == 0
    assert "0/3" in shown
    assert shown.count(": passed, ") == 3


def test_a_seed_that_breaks_the_simulator_is_named_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def strike(self: Nemesis) -> None:
        raise RuntimeError("a slip of ours")

    monkeypatch.setattr(Nemesis, "start", strike)
    assert main(["--seeds", "1..2", "--scenario", "calm", "--virtual-seconds", "3"]) == 1
    out = capsys.readouterr().out
    assert out.count("SimulatorFailed") == 2 and out.count("RuntimeError: a slip of ours") == 2
    assert "replay: raftkv sim --seed 2 --scenario calm" in out


def test_a_violated_seed_says_how_to_replay_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    duplicate_applied(monkeypatch)
    assert main(["--seeds", "1..4", "--scenario", "network", "--virtual-seconds", "10"]) == 1
    out = capsys.readouterr().out
    assert "replay: raftkv sim --seed " in out
    assert "--scenario network --virtual-seconds 10" in out
    assert "all heals" in out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--seeds", "3"],
        ["--seeds", "5..1"],
        ["--seed", "x"],
        ["--seed", "1", "--virtual-seconds", "0"],
        ["--seed", "1", "--virtual-seconds", "nan"],
        ["--seeds", "1..2", "--jobs", "0"],
    ],
)
def test_bad_arguments_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2


def test_an_unknown_scenario_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "1", "--scenario", "nosuch"]) == 2
    assert "the scenarios here are" in capsys.readouterr().err


def test_an_unknown_fault_names_those_there_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "odd.toml").write_text("[nemesis.faults]\nearthquake = 1\n")
    assert main(["--seed", "1", "--scenario", str(tmp_path / "odd.toml")]) == 2
    assert "odd: there is no fault 'earthquake'; there are " in capsys.readouterr().err


def test_every_scenario_can_be_read() -> None:
    assert {"mix", "calm"} <= set(names())
    for name in names():
        assert load(name).name == name
        check_faults(load(name))


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"clusters": {}}, "unknown setting 'clusters'"),
        ({"cluster": {"groups": "two"}}, "cluster.groups must be like 2"),
        ({"cluster": 3}, "cluster must be a table"),
        ({"network": {"latency_ms": [3, 1]}}, "a number or a range"),
        ({"nemesis": {"faults": {"kill": "often"}}}, "a table of weights"),
        ({"virtual_seconds": True}, "virtual_seconds must be like"),
        ({"cluster": {"replicas": 0}}, "at least one controller, replica and shard"),
        ({"nemesis": {"faults": {"kill": -1}}}, "a weight is never below 0"),
    ],
)
def test_a_bad_scenario_is_refused(document: dict[str, object], problem: str) -> None:
    with pytest.raises(ScenarioError, match=problem):
        parse(document, "bad")


def test_a_number_stands_for_a_range() -> None:
    scenario = parse({"network": {"latency_ms": 2}, "virtual_seconds": 5}, "x")
    assert scenario.network.latency_ms == (2.0, 2.0)
    assert scenario.virtual_seconds == 5.0
