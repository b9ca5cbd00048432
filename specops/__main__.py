"""``python -m specops``: the command where its folder is not on the path."""

from specops.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
