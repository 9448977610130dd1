"""`python -m hf_freeze.cli`: the command line, where its script is not on the path."""

from . import main

if __name__ == "__main__":
    main()
