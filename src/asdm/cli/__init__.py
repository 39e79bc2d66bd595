"""The command line: a file for each command."""

from asdm.cli.commands import app as app
from asdm.cli.commands import main as main
