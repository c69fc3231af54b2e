"""``%cluster retry``: the items of a cell that have no value, once more."""

from __future__ import annotations

import argparse
from typing import Any

from nbray.notebook import over_items
from nbray.notebook.arguments import Parser
from nbray.notebook.cockpit import Cockpit
from nbray.notebook.commands import Command, described


def _parser() -> Parser:
    parser = Parser("%cluster retry", described("retry"))
    parser.add_argument(
        "cell",
        nargs="?",
        metavar="CELL",
        help="the cell, for instance In[7] (the last one that has failed items)",
    )
    return parser


def _retry(cockpit: Cockpit, options: argparse.Namespace) -> Any:
    title = options.cell or ""
    if title.isdigit():
        title = f"In[{title}]"
    return over_items.find(cockpit.over_items, title).again()


COMMANDS = {"retry": Command(_parser, _retry)}
