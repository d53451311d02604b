"""`python -m polarctl` is the `polarctl` program."""

from polarctl.cli import main

if __name__ == "__main__":
    main()
