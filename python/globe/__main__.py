"""`python -m globe` is the command `globe`."""

from globe.cli import main

if __name__ == "__main__":
    main()
