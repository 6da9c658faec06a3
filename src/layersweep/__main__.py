"""`python -m layersweep`."""

from layersweep.cli.app import main

if __name__ == "__main__":
    main()
