"""`python -m app` is `sluice`."""

from app.cli import main

if __name__ == "__main__":
    main(prog_name="sluice")
