"""``python -m loratool``: the same as the command ``loratool``."""

from __future__ import annotations

from loratool.cli.main import main

if __name__ == "__main__":
    main()
