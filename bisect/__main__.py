"""`python -m bisect` is the command line of aprjax."""

from aprjax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
