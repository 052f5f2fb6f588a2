"""The grammar that all three ways to run a command share."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from raftkv.cli.command_table import (
    CommandTable,
    Parsed,
    help_text,
    parse,
    parse_controllers,
    parse_count,
    parse_seconds,
)
from raftkv.cli.exit_codes import UsageError
from raftkv.cli.programs import command_table
from raftkv.cli.words import Word, split_words

KV = command_table("raftkv-kv")
CTL = command_table("raftkv-ctl")


def parse_line(
    line: str, table: CommandTable = KV, *, on_a_line: bool = False, environment: Mapping[str, str] | None = None
) -> Parsed:
    return parse(table, split_words(line.encode()), environment=environment or {}, on_a_line=on_a_line)


@pytest.mark.parametrize("name", ["put", "PUT", "Put", "pUt"])
def test_names_are_case_insensitive(name: str) -> None:
    parsed = parse_line(f"{name} k v")
    assert parsed.command is not None
    assert parsed.command.name == "Put"


@pytest.mark.parametrize(
    "line",
    [
        "scan p --limit 5 -o json",
        "--limit 5 -o json scan p",
        "-o json scan --limit 5 p",
        "-ojson scan p --limit=5",
        "scan --output=JSON --limit 5 p",
    ],
)
def test_options_stand_before_between_and_after(line: str) -> None:
    parsed = parse_line(line)
    assert (parsed.words, parsed.options) == ((b"p",), {"limit": 5, "output": "json"})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("put k -5", (b"k", b"-5")),
        ("put k -", (b"k", b"-")),
        ("put k -.5", (b"k", b"-.5")),
        ('put k "--limit"', (b"k", b"--limit")),
        ("put k '-o'", (b"k", b"-o")),
        ("put k -- -o", (b"k", b"-o")),
        ("put -- -- --", (b"--", b"--")),
    ],
)
def test_words_that_only_look_like_options(line: str, words: tuple[bytes, ...]) -> None:
    assert parse_line(line).words == words


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("gte k", "unknown command gte; did you mean Get?"),
        ("frobnicate", "unknown command frobnicate; `help` lists the commands"),
        ("get", "Get needs more words: usage: Get KEY [--for-update]"),
        ("get a b", "Get got too many words: usage: Get KEY [--for-update]"),
        ("put k", "Put needs more words: usage: Put KEY VALUE [--if-version N]"),
        ("get k --limit 5", "Get takes no --limit; `help Get` shows what it takes"),
        ("get k --frobnicate", 'unknown option "--frobnicate"; put `--` before words that begin with a dash'),
        (
            "get k --timeot 5",
            'unknown option "--timeot"; did you mean --timeout? put `--` before words that begin with a dash',
        ),
        ("scan --limit", "--limit needs a value: --limit N"),
        ("scan --limit five", "--limit: 'five' is not a whole number"),
        ("scan --limit 0", "--limit: 0 is out of range: it must be between 1 and 4611686018427387904"),
        ("get k -o yaml", "-o: 'yaml' is not one of plain, json, table"),
        ("get k --timeout soon", "--timeout: 'soon' is not a time; write seconds, such as 10 or 0.5, or 500ms"),
        ("get k --timeout 0", "--timeout: '0' is not a time that is more than 0 and at most 86400 seconds"),
        ("get k --timeout nan", "--timeout: 'nan' is not a time that is more than 0 and at most 86400 seconds"),
        ("get k --controllers h", "--controllers: address 'h' is not HOST:PORT"),
        ("--limit 5", "raftkv-kv takes no --limit; `help raftkv-kv` shows what it takes"),
        ("get k --keep-going=maybe", "--keep-going takes no value other than yes or no"),
    ],
)
def test_usage_errors_are_one_line(line: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_line(line).call()
    assert str(caught.value) == complaint


def test_unknown_commands_in_any_bytes() -> None:
    with pytest.raises(UsageError, match="unknown command"):
        parse(KV, [Word(b"\xff\n")], environment={})


def test_options_of_the_program_do_not_stand_on_a_line() -> None:
    with pytest.raises(UsageError, match="--pipeline belongs on the command line"):
        parse_line("get k --pipeline 4", on_a_line=True)
    assert parse_line("get k --timeout 2 -o json", on_a_line=True).options == {"timeout": 2.0, "output": "json"}


def test_every_setting_has_an_environment_variable() -> None:
    for table in (KV, CTL):
        for option in (*table.options, *(option for command in table.commands for option in command.options)):
            if not option.variable:
                parsed = parse(table, [Word(table.commands[0].name.encode())], environment={option.environment: "3"})
                assert parsed.options == {}, option.environment
                continue
            if option.parse is None:
                environment, expected = {option.environment: "yes"}, True
            else:
                text = {"output": "json", "controllers": "h:1"}.get(option.key, "3")
                environment, expected = {option.environment: text}, option.parse(text)
            owner = next((row for row in table.commands if option in row.options), table.by_name["help"])
            parsed = parse(table, [Word(owner.name.encode())], environment=environment)
            assert parsed.options == {option.key: expected}, option.environment


def test_the_command_line_wins_over_the_environment() -> None:
    assert parse_line("get k --timeout 2", environment={"RAFTKV_TIMEOUT": "7"}).options == {"timeout": 2.0}
    with pytest.raises(UsageError, match=r"RAFTKV_TIMEOUT: 'x' is not a time"):
        parse_line("get k", environment={"RAFTKV_TIMEOUT": "x"})
    assert parse_line("get k", environment={"RAFTKV_TIMEOUT": ""}).options == {}


def test_on_a_line_the_environment_is_silent_where_the_program_has_heard_it() -> None:
    """Else RAFTKV_TIMEOUT would win over --timeout of the program on every line of a script."""
    assert (
        parse_line("get k", environment={"RAFTKV_TIMEOUT": "7", "RAFTKV_OUTPUT": "json"}, on_a_line=True).options == {}
    )


def test_ctrl_peers_is_an_alias() -> None:
    assert parse_line("query --ctrl-peers h:1,h:2", CTL).options == {"controllers": ("h:1", "h:2")}


@pytest.mark.parametrize("table", [KV, CTL])
def test_help_names_every_command_and_option(table: CommandTable) -> None:
    overview = help_text(table)
    for option in table.options:
        assert option.usage in overview
        assert (option.environment in overview) == option.variable
    for command in table.commands:
        assert command.usage in overview
        assert command.summary in overview
        own = help_text(table, command)
        assert own.startswith(command.usage)
        assert all(example in own for example in command.examples)


@pytest.mark.parametrize("table", [KV, CTL])
def test_examples_in_the_help_are_commands(table: CommandTable) -> None:
    examples = [example for command in table.commands for example in command.examples]
    assert len(examples) > 5
    for example in examples:
        parse_line(example, table).call()


def test_numbers_and_times() -> None:
    assert parse_seconds("10") == parse_seconds("10s") == 10
    assert parse_seconds("500ms") == 0.5
    assert parse_count("-5", least=-5) == -5
    for text in ("", "-", "5x", "٣", "1e3", " 5"):
        with pytest.raises(ValueError, match="is not a whole number"):
            parse_count(text)
    for text in ("0", "-1", "9" * 30, "9" * 1_000_000):
        with pytest.raises(ValueError, match=r"9?…? is out of range: it must be between 1 and \d+$"):
            parse_count(text)
    assert parse_controllers(" h:1, h:2,") == ("h:1", "h:2")
    for text in ("", ",", "h:0", "h:65536", ":1", "h:x", "h"):
        with pytest.raises(ValueError, match=r"HOST:PORT|the port must be"):
            parse_controllers(text)
