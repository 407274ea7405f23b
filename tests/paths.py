"""Where the sources and the recorded vectors are."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARITY = Path(os.environ.get("PARITY_DIR") or ROOT / "tests/data/parity")
