"""The command line: a file for each command, which parses, calls the API and prints.

Importing it imports neither torch nor diffusers, so that `asdm --help` is quick. A command imports the packages that
it needs in the first lines of its body.
"""

from asdm.cli.app import app as app
from asdm.cli.main import main as main
