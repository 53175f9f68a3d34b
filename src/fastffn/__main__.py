"""`python -m fastffn`, and `torchrun ... -m fastffn`."""

from fastffn.cli import main

if __name__ == "__main__":
    main()
