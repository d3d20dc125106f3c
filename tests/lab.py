"""JupyterLab in headless Chromium, and the workbench in one of its pages, in a user's words:
for the browser's journeys, and for scripts that measure it or take its pictures.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from chromium import SHOTS

ROOT = Path(__file__).parents[1]
#: milliseconds; a busy machine is no failure
PATIENCE = 300_000
LAYOUT_SECONDS = 1.0


@contextmanager
def lab_server(folder):
    """A JupyterLab of its own, without the user's settings; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = {
        name: str(folder / name.lower())
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR")
    }
    paths |= {
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "IPYTHONDIR": str(folder / "ipython"),
    }
    env = {
        **os.environ,
        **paths,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    for not_a_persons in ("ABDLAB_HEADLESS", "PYTHONDONTWRITEBYTECODE"):
        env.pop(not_a_persons, None)
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--IdentityProvider.token=t",
    ]
    command += [
        f"--ServerApp.root_dir={folder}",
        "--LabApp.news_url=",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    log = open(folder / "server.log", "w")  # noqa: SIM115 (as long as the server)
    server = subprocess.Popen(
        command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api?token=t", timeout=2)
                break
            except OSError:
                assert server.poll() is None, (folder / "server.log").read_text()
                time.sleep(0.5)
        yield address
    finally:  # its kernels end with it
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
        log.close()


def written(folder, name, before, overrides):
    """The workbench's notebook for a folder of its own, as FOLDER/NAME.ipynb."""
    book = json.loads((ROOT / "notebooks/00_workbench.ipynb").read_text())
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    code[0]["source"] = (
        f'run = "{folder / name}"\npreset = "quick/digits"\nseed = 0\ndevice = "cpu"\noverrides ='
        f' {overrides!r}\nlabel = "zskt+sv+tu"'
    )
    code[1]["source"] = before + "".join(code[1]["source"])
    (folder / f"{name}.ipynb").write_text(json.dumps(book))


class Bench:
    """The workbench in a page, in a user's words."""

    def __init__(
        self, browser, lab, folder, name, before="", theme="Light", narrow=False, **overrides
    ):
        self.runs = folder / name
        written(folder, name, before, overrides)
        self.began = None
        self.size = {"width": 1280, "height": 800 if narrow else 1000}
        self.page = browser.new_page(viewport=self.size)
        self.page.set_default_timeout(PATIENCE)
        self.troubles = []
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.set(lab, "themes", {"theme": f"JupyterLab {theme}"})
        self.set(lab, "notification", {"fetchNews": "false"})
        self.page.goto(f"{lab}/lab?token=t&reset")
        self.open_notebook(f"{name}.ipynb")
        # the file browser takes a fifth of the page
        if self.page.locator("#jp-left-stack").is_visible() != narrow:
            self.page.keyboard.press("Control+b")
        self.menu("Run", "Run All Cells")
        self.tab("1 Teacher").wait_for()

    def open_notebook(self, file):
        """Double-click it in the file browser, and wait for its kernel."""
        item = self.page.locator(".jp-DirListing-item", has_text=file)
        item.wait_for()
        self.page.locator(".jp-LauncherCard").first.wait_for()  # Lab is all there
        self.began = time.monotonic()
        item.dblclick()
        ask = self.page.locator(".jp-Dialog button", has_text="Select").last
        # the toolbar's own sign says so before the kernel is there
        idle = self.page.locator(".jp-StatusBar-TextItem", has_text=re.compile(r"\| Idle"))
        ask.or_(idle).first.wait_for()
        if ask.is_visible():
            ask.click()  # which kernel
        idle.wait_for()

    @staticmethod
    def set(lab, what, values):
        body = json.dumps({"raw": json.dumps(values)}).encode()
        address = f"{lab}/lab/api/settings/@jupyterlab/apputils-extension:{what}?token=t"
        headers = {"Authorization": "token t", "Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(address, body, headers, method="PUT"))

    def menu(self, *items):
        self.page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{items[0]}$")).click()
        for item in items[1:]:
            self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{item}$")).last.click()

    def tab(self, name):
        return self.page.locator(".jupyter-widgets .lm-TabBar-tab", has_text=name)

    def open(self, name):
        self.tab(name).click()

    def button(self, name):
        return self.page.get_by_role("button", name=name, exact=True).locator("visible=true").first

    def slider(self, label):
        return self.page.locator(f"input[type=range][aria-label='{label}']:visible").first

    def field(self, label):
        return self.page.get_by_label(label, exact=True).locator("visible=true").first

    def in_sight(self, picture):
        """Whether a picture is wholly inside the page, with nothing scrolled by hand."""
        box = picture.bounding_box()
        right, below = box["x"] + box["width"], box["y"] + box["height"]
        return box["y"] >= 0 and below <= self.size["height"] and right <= self.size["width"]

    def text(self, pattern):
        return (
            self.page.locator(
                ".abdlab-said, .abdlab-quiet, .abdlab-score, .abdlab-wrong, .abdlab-empty,"
                " .abdlab-who"
            )
            .locator("visible=true")
            .filter(has_text=re.compile(pattern))
            .first
        )

    def picture(self, words):
        return (
            self.page.locator(f'.abdlab-picture img[alt*="{words}"]').locator("visible=true").first
        )

    def tab_to(self, what, key="Tab"):
        """Press Tab until an element has the focus, which shows where it is."""
        for _ in range(150):
            self.page.keyboard.press(key)
            # looked up each time: a table may be drawn anew meanwhile
            if what.evaluate("e => document.activeElement === e"):
                style = what.evaluate("e => getComputedStyle(e).outlineStyle")
                assert style != "none", "the focus is not visible"
                return
        active = self.page.evaluate("document.activeElement.outerHTML.slice(0, 300)")
        raise AssertionError(f"{key} does not reach {what}; it is at {active}")

    def go_to(self, name):
        """Choose a tab with the keyboard, from inside the one that is open: Tab comes to the
        tab that had the focus last, arrows go on from it.
        """
        tabs = self.page.locator(".jupyter-widgets .lm-TabBar-tab")
        self.tab_to(tabs.and_(self.page.locator("[tabindex='0']")).first, "Shift+Tab")
        here = "document.activeElement.textContent"
        key = "ArrowRight" if name > self.page.evaluate(here) else "ArrowLeft"
        while name not in self.page.evaluate(here):
            before = self.page.evaluate(here)
            self.page.keyboard.press(key)
            assert self.page.evaluate(here) != before, f"{key} does not leave {before}"
        self.page.keyboard.press("Enter")
        self.page.locator(".lm-TabBar-tab.lm-mod-current", has_text=name).wait_for()

    def nameless(self):
        """Controls and pictures of the open tab that a screen reader has no name for."""
        said = self.page.locator(".jp-OutputArea-output .abdlab").first.aria_snapshot()
        kinds = "button|textbox|combobox|slider|spinbutton|checkbox|listbox|img|progressbar|grid"
        return re.findall(rf"- (?:{kinds})\b(?! \")[^\n]*", said)

    def begin(self):
        """Start, and go on where the tiny teacher's backdoor is asked about."""
        self.button("Start").click()
        asked = self.text("there is next to no backdoor")
        asked.or_(self.text("^ACC[0-9.]+%")).first.wait_for()
        if asked.is_visible():
            self.button("Go on").click()
        self.text("^ACC[0-9.]+%").wait_for()

    def view(self, name):
        """The page as its user sees it."""
        SHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png")

    def shot(self, name):
        """The whole workbench, however tall it is."""
        SHOTS.mkdir(exist_ok=True)
        self.page.mouse.move(640, 4)
        top = self.page.locator(".jp-OutputArea-output:has(.lm-TabBar-tab)").first
        height = int(top.bounding_box()["height"])
        self.page.set_viewport_size({"width": 1280, "height": max(1000, height + 260)})
        self.page.wait_for_timeout(1000 * LAYOUT_SECONDS)
        top.scroll_into_view_if_needed()
        self.page.wait_for_timeout(1000 * LAYOUT_SECONDS)
        top.screenshot(path=SHOTS / f"{name}.png")
        assert top.evaluate("e => e.scrollWidth <= e.clientWidth + 1"), (
            f"{name} is wider than the page"
        )
        self.page.set_viewport_size(self.size)

    def close(self):
        assert not self.troubles
        self.page.close()
