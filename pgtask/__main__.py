"""`python -m pgtask` is `pgtask-master`."""

from pgtask import cli

if __name__ == "__main__":
    cli.master(prog_name="pgtask-master")
