"""Where the browser tests find Chromium, and where they leave their pictures."""

import shutil
from pathlib import Path

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
SHOTS = Path(__file__).parents[1] / "artifacts"
