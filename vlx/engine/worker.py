"""One process of a distributed run: `python -m vlx.engine.worker RUN_DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

from vlx.core.errors import VlxError
from vlx.engine.run import execute


def main() -> int:
    try:
        return execute(Path(sys.argv[1]))
    except VlxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
