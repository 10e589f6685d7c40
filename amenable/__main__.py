"""`python -m amenable` is the command `amenable`."""

from amenable.cli import main

main()
