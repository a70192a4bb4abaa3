"""`python -m mtl`, the same as `mtl`."""

from mtl.cli import main

if __name__ == "__main__":
    main()
