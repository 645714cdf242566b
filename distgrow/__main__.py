"""`python -m distgrow`: the command line."""

from distgrow.cli import main

if __name__ == "__main__":
    main()
