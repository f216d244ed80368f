"""`python -m billing_tailer` is the same as the console script `billing-tailer`."""

from billing_tailer.cli import main

if __name__ == "__main__":
    main()
