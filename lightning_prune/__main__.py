"""``python -m lightning_prune``: the command line."""

from lightning_prune.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
