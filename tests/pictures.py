"""Takes the README's pictures of the workbench anew, from the first preset in JupyterLab:
``python tests/pictures.py [RUNS]``, or ``make pictures``

A run of the tuner goes to its end first, in minutes. With RUNS, a folder of results,
what is there is used.
"""

import io
import sys
import tempfile
from pathlib import Path

from chromium import CHROMIUM, SHOTS
from lab import ROOT, Bench, lab_server
from PIL import Image

IMAGES = ROOT / "notebooks/images"
#: pixels, and colours: the files stay small
WIDTH, COLORS = 1100, 256
#: milliseconds
HOUR = 3_600_000
RUN = "zskt.sv.tu@"


def small(shot, target):
    """A screenshot as a PNG that git may hold."""
    image = Image.open(shot).convert("RGB")
    image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.LANCZOS)
    buffer = io.BytesIO()
    # by the colours' spread: the median cut goes by their pixels, and merges small dots'
    method = Image.Quantize.MAXCOVERAGE
    few = image.quantize(COLORS, method, kmeans=2, dither=Image.Dither.NONE)
    few.save(buffer, "PNG", optimize=True)
    target.write_bytes(buffer.getvalue())
    print(f"{target}: {image.width} x {image.height}, {len(buffer.getvalue()) // 1000} kB")


def tuner(b):
    """A run from Start to its end."""
    b.open("2 Defense")
    b.button("Start").or_(b.button("Go on")).first.click()
    b.text(f"^Done: {RUN}").wait_for(timeout=HOUR)
    b.shot("pictures-tuner")


def samples(b):
    """The suspicious tail of what that run learnt from, and where it lies on the map."""
    b.open("3 Samples")
    b.button("Suspicious tail").click()
    b.text("[1-9][0-9]* of [0-9]+ images selected").wait_for()
    b.button("Draw the map").click()
    b.picture("t-SNE map").wait_for(timeout=HOUR)
    b.shot("pictures-samples")


def main(runs=None):
    from playwright.sync_api import sync_playwright

    with (
        tempfile.TemporaryDirectory() as place,
        lab_server(Path(place)) as lab,
        sync_playwright() as playwright,
    ):
        if runs is not None:
            (Path(place) / "pictures").symlink_to(Path(runs).resolve())
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        b = Bench(browser, lab, Path(place), "pictures")
        for part in (tuner, samples):
            part(b)
            small(
                SHOTS / f"pictures-{part.__name__}.png", IMAGES / f"workbench_{part.__name__}.png"
            )
        b.close()
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:2])
