"""Arguments of `raftkv sim` and `raftkv check`: what is wrong with them is one line, as for every other command."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """Without the usage before the error; `--help` has it."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.prog}: {message}; see `{self.prog} --help`\n")
        sys.exit(2)
