"""`python -m sansmax`."""

from sansmax.cli import main

main()
