"""The command line: each verb is a thin wrapper of one library function."""

from sansmax.cli import bags as bags
from sansmax.cli import compare as compare
from sansmax.cli import runs as runs
from sansmax.cli import slides as slides
from sansmax.cli import tools as tools
from sansmax.cli.app import app as app
from sansmax.cli.app import main as main
