"""`python -m asdm` is `asdm`."""

from asdm.cli import main

if __name__ == "__main__":
    main()
