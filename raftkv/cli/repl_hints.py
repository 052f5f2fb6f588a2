"""What may follow, dim behind the cursor: the arguments that a command still takes, and earlier lines that began so.

The hint is shown where a new word could begin, the suggestion from the history once it has: Right takes that over.
"""

from __future__ import annotations

from prompt_toolkit.auto_suggest import AutoSuggestFromHistory, Suggestion
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.document import Document
from prompt_toolkit.filters import is_done
from prompt_toolkit.layout.processors import ConditionalProcessor, Processor, Transformation, TransformationInput

from raftkv.cli.command_table import CommandTable
from raftkv.cli.typed_line import TypedWord, roles_of, typed_commands


def hint(table: CommandTable, text: str) -> str:
    """What the command at the end of `text` still takes, as its usage line has it; empty if nothing is known."""
    typed = typed_commands(table, text)[-1]
    command = typed.command
    if (
        command is None
        or typed.pipe is not None
        or typed.is_open
        or any(word.wrong is not None for word in typed.words)
    ):
        return ""
    last, at_its_end = typed.roles[-1], typed.words[-1].end == len(text)
    space = " " if at_its_end else ""
    following = roles_of(table, [*typed.words, TypedWord(len(text), len(text), "")])[-1]
    if following.kind == "value" and following.option is not None:
        return f"{space}{following.option.metavar}"
    if at_its_end and last.kind in ("option", "dashes"):
        return ""
    roles = typed.roles[max(i for i, role in enumerate(typed.roles) if role.kind == "command") :]
    if any(role.kind == "extra" for role in roles):
        return ""
    arguments = [*command.arguments]
    parts = []
    for _ in [role for role in roles if role.kind == "argument"]:
        if not arguments[0].many:
            arguments.pop(0)
        else:
            parts = [f"[{arguments.pop(0).name} …]"]
            break
    parts += [argument.usage for argument in arguments]
    given = {role.option.key for role in typed.roles if role.option is not None}
    options = [option for option in command.options if option.key not in given]
    parts += [f"[{option.usage.split(', ')[-1]}]" for option in options]
    return space + " ".join(parts) if parts else ""


class SuggestEarlierLines(AutoSuggestFromHistory):
    """From the history, while a word is being typed."""

    def get_suggestion(self, buffer: Buffer, document: Document) -> Suggestion | None:
        """The rest of the latest line that began so."""
        if document.text.endswith((" ", "\n")) or "\n" in document.text:
            return None
        return super().get_suggestion(buffer, document)


class ShowHint(Processor):
    """Behind the last line, unless a suggestion stands there."""

    def __init__(self, table: CommandTable) -> None:
        self._table = table

    def apply_transformation(self, transformation_input: TransformationInput) -> Transformation:
        """The line with the hint after it."""
        document, fragments = transformation_input.document, transformation_input.fragments
        buffer = transformation_input.buffer_control.buffer
        is_last = transformation_input.lineno == document.line_count - 1
        if not is_last or not document.is_cursor_at_the_end or (buffer.suggestion and buffer.suggestion.text):
            return Transformation(fragments)
        return Transformation([*fragments, ("class:hint", hint(self._table, document.text))])


def hints(table: CommandTable) -> Processor:
    """For the prompt; gone when the line is accepted."""
    return ConditionalProcessor(ShowHint(table), ~is_done)
