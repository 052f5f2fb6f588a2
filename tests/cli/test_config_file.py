"""The configuration file: below the environment, below the command line; what is wrong with it names file and key."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from raftkv.cli.config_file import DAEMON, DAEMONS, Config, load, path_of
from raftkv.cli.daemons import coordinator
from raftkv.cli.exit_codes import UsageError
from raftkv.cli.local_cluster import _start
from raftkv.cli.local_state import LocalProcess, LocalState
from raftkv.cli.main import _root
from tests.cli.clusters import run

NOBODY = "127.0.0.1:9"


def write(directory: Path, text: str | bytes) -> Path:
    """The file where XDG_CONFIG_HOME=directory has it."""
    path = directory / "raftkv" / "config.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def loaded(directory: Path, text: str | bytes) -> Config:
    write(directory, text)
    return load({"XDG_CONFIG_HOME": str(directory)})


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert path_of({}) == path_of({"XDG_CONFIG_HOME": "relative"}) == Path("/home/me/.config/raftkv/config.toml")
    assert path_of({"XDG_CONFIG_HOME": "/etc/xdg"}) == Path("/etc/xdg/raftkv/config.toml")
    assert path_of({"XDG_CONFIG_HOME": "/etc/xdg", "RAFTKV_CONFIG": "x.toml"}) == Path("x.toml")


def test_without_a_file_nothing_is_set(tmp_path: Path) -> None:
    for environment in ({"XDG_CONFIG_HOME": str(tmp_path)}, {"RAFTKV_CONFIG": ""}):
        config = load(environment)
        assert (dict(config.client), dict(config.daemon)) == ({}, {})


def test_all_keys(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        """
        controllers = ["h:1", "h:2"]
        timeout = 5
        output = "JSON"
        tls_cert = "/etc/c.crt"
        tls_key = "keys/c.key"
        tls_ca = "~/ca.crt"
        [daemon]
        controllers = "h:1,h:2"
        snapshot_entries = 7
        log_format = "json"
        """,
    )
    assert config.client == {
        "controllers": ("h:1", "h:2"),
        "timeout": 5.0,
        "output": "json",
        "tls_cert": "/etc/c.crt",
        "tls_key": str(tmp_path / "raftkv" / "keys" / "c.key"),
        "tls_ca": str(Path.home() / "ca.crt"),
    }
    assert config.daemon == {"controllers": ("h:1", "h:2"), "snapshot_entries": 7, "log_format": "json"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("timeot = 5", "unknown key timeot; there are controllers, timeout, output, tls_cert, tls_key, tls_ca"),
        ("data_dir = '/x'", "unknown key data_dir; there are"),
        ("[daemon]\nlisten = 'h:1'", "unknown key daemon.listen; there are controllers, snapshot_entries"),
        ("daemon = 5", "daemon must be a table: [daemon]"),
        ("timeout = true", "timeout: True is not a time; write seconds"),
        ("timeout = 0", "timeout: '0' is not a time that is more than 0"),
        ("timeout = 'soon'", "timeout: 'soon' is not a time"),
        ("timeout = [1]", "timeout: [1] is not a time"),
        ("controllers = 5", "controllers: 5 is no list of texts"),
        ("controllers = ['h:1', 2]", "controllers: ['h:1', 2] is no list of texts"),
        ("controllers = []", "controllers: give at least one HOST:PORT"),
        ("controllers = ['h']", "controllers: address 'h' is not HOST:PORT"),
        ("output = 'yaml'", "output: 'yaml' is not one of plain, json, table"),
        ("output = 1", "output: 1 is not one of"),
        ("tls_ca = 1", "tls_ca: 1 is not a text in quotes"),
        ("tls_ca = ''", "tls_ca: '' is not a text in quotes"),
        ("[daemon]\ncache_bytes = '1'", "daemon.cache_bytes: '1' is not a whole number"),
        ("[daemon]\ncache_bytes = true", "daemon.cache_bytes: True is not a whole number"),
        ("timeout = ", "config.toml is not TOML: Invalid value (at "),
        (b"output = '\xff'", "config.toml is not TOML: 'utf-8' codec can't decode"),
    ],
)
def test_what_is_wrong_names_file_and_key(tmp_path: Path, text: str | bytes, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        loaded(tmp_path, text)
    assert str(tmp_path / "raftkv" / "config.toml") in str(caught.value)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_can_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    path.unlink()
    path.mkdir()
    with pytest.raises(UsageError, match=f"can't read the configuration file {path}: Is a directory"):
        load({"XDG_CONFIG_HOME": str(tmp_path)})
    with pytest.raises(UsageError, match="/nope: there is no such file; RAFTKV_CONFIG names it"):
        load({"RAFTKV_CONFIG": "/nope"})


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    write(tmp_path, f"controllers = '{NOBODY}'\ntimeout = 0.25\n")

    def timeout_of(*arguments: str, variable: str = "") -> str:
        ran = run("raftkv-kv", *arguments, "get", "k", XDG_CONFIG_HOME=str(tmp_path), RAFTKV_TIMEOUT=variable)
        assert ran.code == 3 and NOBODY in ran.err
        return ran.err.split(" within ")[1].split(" s")[0]

    assert timeout_of() == "0.25"
    assert timeout_of(variable="0.5") == "0.5"
    assert timeout_of("--timeout", "0.75", variable="0.5") == "0.75"
    script = run(
        "raftkv-kv", "--timeout", "0.75", stdin=b"get k\n", XDG_CONFIG_HOME=str(tmp_path), RAFTKV_TIMEOUT="0.5"
    )
    assert " within 0.75 s" in script.err  # on a line too


def test_a_broken_file_is_a_usage_error_but_help_is_there(tmp_path: Path) -> None:
    path = write(tmp_path, "timeout = 'x'\n")
    for arguments in (("raftkv-kv", "get", "k"), ("raftkv-ctl", "status"), ("raftkv", "local", "status")):
        ran = run(*arguments, XDG_CONFIG_HOME=str(tmp_path))
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, b"", 1)
        assert f"{path}: timeout: 'x' is not a time" in ran.err
    for program in ("raftkv-kv", "raftkv"):
        assert run(program, "--help", XDG_CONFIG_HOME=str(tmp_path)).code == 0


def test_a_daemon_says_what_it_does_not_take(tmp_path: Path) -> None:
    path = write(tmp_path, "[daemon]\nlog_level = 'loud'\n")
    options = ("--id", "0", "--listen", NOBODY, "--peers", f"0={NOBODY}", "--data-dir", str(tmp_path / "d"))
    ran = run("raftkv", "controller", *options, XDG_CONFIG_HOME=str(tmp_path))
    assert ran.code == 2
    assert ran.err.startswith(f"raftkv controller: {path}: daemon.log_level: 'loud' is not one of 'debug'")


def test_every_key_of_the_daemons_is_an_option_of_one() -> None:
    from raftkv.cli import config_file

    names = {param.name for name in DAEMONS for param in _command(name).params}
    assert set(config_file._DAEMON_KEYS) <= names
    for key in config_file._CLIENT_KEYS:
        defaults = Config(Path("f"), {key: "x"}).click_defaults()
        for name in ("bench", "health"):
            own = {param.name for param in _command(name).params}
            assert name == "health" or set(defaults[name]) <= own


def _command(name: str) -> click.Command:
    command = _root().get_command(click.Context(click.Command("raftkv")), name)
    assert command is not None
    return command


def test_click_takes_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(coordinator, "callback", lambda **options: seen.update(options))
    config = Config(Path("f"), daemon={"controllers": ("h:1",), "cache_bytes": 5, "log_level": "debug"})
    arguments = ["--id", "0", "--listen", "h:1", "--peers", "0=h:1", "--data-dir", "d", "--log-level", "error"]
    coordinator.main(arguments, standalone_mode=False, default_map=config.click_defaults()["coordinator"])
    assert (seen["controllers"], seen["cache_bytes"], seen["log_level"]) == (("h:1",), 5, "error")


def test_daemons_of_a_local_cluster_read_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: dict[str, Any] = {}
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **details: started.update(details))
    (tmp_path / "logs").mkdir()
    process = LocalProcess("controller", None, 0, "127.0.0.1:1")
    _start(tmp_path, LocalState(0, 1, 10, 1, [process]), process)
    assert started["env"]["RAFTKV_CONFIG"] == ""


def test_the_parser_is_imported_only_if_there_is_a_file(tmp_path: Path) -> None:
    code = (
        "import json, sys\n"
        "from raftkv.cli.programs import main\n"
        f"main('raftkv-kv', ['--controllers', '{NOBODY}', '--timeout', '0.1', 'get', 'k'])\n"
        "print(json.dumps('tomllib' in sys.modules))\n"
    )

    def imported() -> bool:
        environment = {"XDG_CONFIG_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True)
        return bool(json.loads(done.stdout))

    assert not imported()
    write(tmp_path, "timeout = 5\n")
    assert imported()


def test_the_readme_names_every_key() -> None:
    from raftkv.cli import config_file

    section = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split("config.toml")[1]
    for key in (*config_file._CLIENT_KEYS, *config_file._DAEMON_KEYS, DAEMON):
        assert key in section, key
