"""`python -m outrider` is the command line."""

from outrider.cli import main

main(prog_name="outrider")
