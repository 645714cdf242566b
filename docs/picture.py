"""Take the picture of a run's report, docs/images/report.png, again: `make picture`."""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from distgrow.report.write import write

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars")
PICTURE = Path(__file__).parent / "images" / "report.png"


def main() -> None:
    """Write the run's report, open it in a browser without a window, and keep the top of the page in 64 colours."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run's folder, as make demo leaves it")
    parser.add_argument("--size", default="900,1082", help="width and height of the page's part, pixels")
    given = parser.parse_args()
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"no browser: install one of {', '.join(BROWSERS)}")
    write([given.run], None)
    page = (Path(given.run) / "report.html").resolve().as_uri()
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        command = [browser, *FLAGS, f"--window-size={given.size}", f"--screenshot={shot}", page]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        PICTURE.parent.mkdir(exist_ok=True)
        Image.open(shot).convert("RGB").quantize(64).save(PICTURE, optimize=True)
    print(f"wrote {PICTURE} ({PICTURE.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
