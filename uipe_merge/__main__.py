"""``python -m uipe_merge``."""

from uipe_merge.cli.app import main

if __name__ == "__main__":
    main()
