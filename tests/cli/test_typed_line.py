"""A line as it is being typed: the words of `split_words`, the roles of `parse`, and nothing is an error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raftkv.cli.command_table import parse
from raftkv.cli.exit_codes import UsageError
from raftkv.cli.programs import command_table
from raftkv.cli.typed_line import TypedCommand, begin_word, typed_commands
from raftkv.cli.words import UnfinishedQuote, WordError, split_words

KV = command_table("raftkv-kv")
CTL = command_table("raftkv-ctl")

LINES = st.text(alphabet="ab 'x\"\\\\nr0tf1-#|=\t", max_size=30)
COMMANDS = st.lists(
    st.sampled_from(
        ["put", "GET", "scan", "k", "-", "--", "-5", "--limit", "5", "--limit=5", "-ojson", "-o", "json", "x"]
    ),
    max_size=8,
)


def typed(text: str) -> TypedCommand:
    (command,) = typed_commands(KV, text)
    return command


@given(LINES)
def test_the_words_are_those_of_split_words(text: str) -> None:
    command = typed(text)
    if command.comment is not None:
        return
    line = command.text_of(text).encode()
    try:
        words = split_words(line)
    except UnfinishedQuote:
        assert command.words[-1].wrong is None
        assert not command.words[-1].closed
    except WordError:
        assert any(word.wrong is not None or not word.closed for word in command.words)
    else:
        assert [(word.data, bool(word.quote)) for word in command.words] == words
        assert all(word.wrong is None and word.closed for word in command.words)


@given(LINES)
def test_every_part_of_a_text_belongs_to_one_word_at_most(text: str) -> None:
    position = 0
    for word in typed(text).words:
        assert position <= word.start < word.end <= len(text)
        assert not text[position : word.start].strip()
        assert text[word.start : word.end].startswith(word.quote)
        position = word.end
        for start, end in word.escapes:
            assert word.start < start < end <= word.end


@given(COMMANDS)
def test_the_roles_are_those_of_parse(words: list[str]) -> None:
    line = " ".join(words)
    try:
        parsed = parse(KV, split_words(line.encode()), environment={}, on_a_line=True)
    except UsageError:
        return
    command = typed(line)
    roles = list(zip(command.words, command.roles, strict=True))
    assert [word.data for word, role in roles if role.kind in ("argument", "extra")] == list(parsed.words)
    assert {role.option.key for _, role in roles if role.kind == "option" and role.option} == set(parsed.options)
    assert command.command is parsed.command


def test_a_quote_may_go_on_on_the_next_line() -> None:
    assert typed('put k "a').is_open
    assert typed('put k "a\nb').is_open
    assert typed("put k 'a\n\\").is_open
    assert not typed('put k "a\nb"').is_open
    assert not typed('put k "\\q').is_open  # it is wrong, and will not become right
    assert not typed("put k it's").is_open


def test_a_text_may_hold_several_lines() -> None:
    text = 'put a "1\n2"\n# note\n\nget a | wc -l\nget b'
    commands = typed_commands(KV, text)
    assert [command.text_of(text) for command in commands] == ['put a "1\n2"', "# note", "", "get a ", "get b"]
    assert [command.shell_of(text) for command in commands] == [None, None, None, "wc -l", None]
    assert [command.command and command.command.name for command in commands] == ["Put", None, None, "Get", "Get"]


@pytest.mark.parametrize(
    ("line", "kinds"),
    [
        ("put k v", "command argument argument"),
        ("--limit 5 -o json scan p", "option value option value command argument"),
        ("put -- -o x y", "command dashes argument argument extra"),
        ("get k --frobnicate", "command argument option"),
        ("lock a b c", "command argument argument argument"),
    ],
)
def test_roles(line: str, kinds: str) -> None:
    assert " ".join(role.kind for role in typed(line).roles) == kinds


def test_the_word_that_could_begin() -> None:
    text = "scan p --limit "
    command = typed(text)
    word = begin_word(KV, command, len(text))
    assert (word.start, word.data, command.roles[-1].kind) == (len(text), b"", "value")
    command = typed("scan p")
    assert begin_word(KV, command, 6).data == b"p"
    command = typed_commands(CTL, "move 3 ")[0]
    begin_word(CTL, command, 7)
    argument = command.roles[-1].argument
    assert argument is not None
    assert argument.completes == "gids"


def test_what_is_unfinished_stands_for_what_it_is_so_far() -> None:
    assert typed('put "a b').words[-1].data == b"a b"
    assert typed('put "a\\').words[-1].data == b"a"
    assert typed('put "a\\"').words[-1].data == b'a"'
    assert typed('put "\\xf').words[-1].wrong is None
    assert typed('put "\\xg').words[-1].wrong == 5
    assert typed('put "a"b').words[-1].wrong == 7
