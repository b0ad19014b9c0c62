"""``python -m graphserve``: the command line."""

from graphserve.cli.main import run_process

if __name__ == "__main__":
    run_process()
