"""The pages in a real browser: sort, filter, theme, keyboard, downloads, no console error, nothing wider than the window."""

import io
import json
import shutil
import struct
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from PIL import Image

from quantlab.report.files import write_report
from quantlab.report.leaderboard.files import write_leaderboard
from tests.report.conftest import enrich, make_faulty, make_recipe

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no chromium with chromedriver here"),
]

Driver = Any
GUIDE = Path(__file__).parents[2] / "eval" / "claims" / "guide.yaml"

CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgba = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
const light = ([r, g, b]) => [r, g, b].map((c) => c / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const low = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || element.closest("svg, script, .unseen, [hidden], caption, option") || !element.getClientRects().length) continue;
  let behind = element;
  while (behind && rgba(getComputedStyle(behind).backgroundColor)[3] < 255) behind = behind.parentElement;
  const [a, b] = [light(rgba(getComputedStyle(element).color)), light(rgba(getComputedStyle(behind || document.body).backgroundColor))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) low.push(`${element.tagName}.${element.className} ${element.textContent.trim().slice(0, 20)} ${ratio.toFixed(2)}`);
}
return low;
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory with records and report."""
    directory = tmp_path_factory.mktemp("run")
    records = [enrich(record) for record in make_recipe()]
    records.append(make_faulty(records[4]))
    (directory / "records").mkdir()
    for record in records:
        (directory / "records" / f"{record.variant}.json").write_text(record.model_dump_json())
    write_report(records, directory, claims=GUIDE)
    write_leaderboard([directory], directory / "board")
    return directory


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.downloads = tmp_path_factory.mktemp("downloads")
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(driver.downloads)})
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Driver, run: Path) -> Driver:
    look(browser, width=1280, dark=False)
    browser.get((run / "matrix.html").as_uri())
    return browser


def look(browser: Driver, *, width: int, dark: bool) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})


def shown(page: Driver, table: str = "main") -> list[str]:
    script = "return [...document.getElementById(arguments[0]).tBodies[0].rows].filter((row) => !row.hidden).map((row) => row.dataset.variant)"
    return list(page.execute_script(script, table))


def head(page: Driver, key: str) -> Any:
    return page.find_element(By.CSS_SELECTOR, f'#main th[data-key="{key}"]')


def status(page: Driver) -> str:
    return str(page.find_element(By.ID, "said").text)


def choose(page: Driver, name: str, value: str) -> None:
    page.find_element(By.CSS_SELECTOR, f'form.filter [name="{name}"] option[value="{value}"]').click()


def test_sorting_goes_better_first_then_back(page: Driver) -> None:
    original = shown(page)
    column, button = head(page, "memory_percent_of_fp16"), "button"
    memory = {row.get_attribute("data-variant"): float(row.get_attribute("data-memory")) for row in page.find_elements(By.CSS_SELECTOR, "#main tbody tr")}  # fmt: skip
    column.find_element(By.TAG_NAME, button).click()
    assert column.get_attribute("aria-sort") == "ascending"
    assert [memory[name] for name in shown(page)] == sorted(memory.values())
    assert status(page) == "sorted by memory % of FP16, ascending"
    column.find_element(By.TAG_NAME, button).click()
    assert column.get_attribute("aria-sort") == "descending"
    assert [memory[name] for name in shown(page)] == sorted(memory.values(), reverse=True)
    column.find_element(By.TAG_NAME, button).click()
    assert column.get_attribute("aria-sort") == "none"
    assert shown(page) == original
    speed = head(page, "speed_over_fp16")
    speed.find_element(By.TAG_NAME, button).click()
    assert speed.get_attribute("aria-sort") == "descending"


def test_the_unmeasured_stays_last(page: Driver) -> None:
    loss = head(page, "accuracy_loss_percent").find_element(By.TAG_NAME, "button")
    for _ in range(2):
        loss.click()
        assert shown(page)[-1] == "source"
    assert shown(page)[0] == "faulty"


def test_filters_reach_tables_and_drawings(page: Driver) -> None:
    everything = shown(page)
    page.find_element(By.NAME, "find").send_keys("int8")
    assert shown(page) == shown(page, "rest") == shown(page, "tasks") == ["int8", "int8_weight"]
    assert status(page) == f"2 of {len(everything)} shown"
    faded = (
        "return [...new Set([...document.querySelectorAll('.plot .mark.faded')].map((mark) => mark.dataset.variant))]"
    )
    assert set(page.execute_script(faded)) == set(everything) - {"int8", "int8_weight"}
    page.find_element(By.CSS_SELECTOR, "form.filter [type=reset]").click()
    time.sleep(0.1)
    assert shown(page) == everything
    choose(page, "loss", "none")
    assert shown(page) == ["source", "fp16", "int8", "int8_weight"]
    choose(page, "memory", "75")
    assert shown(page) == ["int8", "int8_weight"]
    choose(page, "loss", "")
    choose(page, "speed", "2")
    assert set(shown(page)) == {"w4a16", "pruned-8-w4a16", "faulty"}


def test_the_theme_follows_the_system_and_then_the_reader(page: Driver) -> None:
    def background() -> str:
        return str(page.execute_script("return getComputedStyle(document.body).backgroundColor"))

    light = background()
    look(page, width=1280, dark=True)
    dark = background()
    assert light != dark
    toggle = page.find_element(By.ID, "theme")
    assert toggle.text == "Light theme"
    toggle.click()
    assert background() == light
    assert toggle.text == "Dark theme"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("file", ["matrix.html", "board/leaderboard.html"])
def test_every_look_is_quiet_fits_and_can_be_read(page: Driver, run: Path, width: int, dark: bool, file: str) -> None:
    for kind in ("browser", "performance"):
        page.get_log(kind)
    look(page, width=width, dark=dark)
    page.get((run / file).as_uri())
    page.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    assert page.execute_script(CONTRAST) == []
    assert page.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert sum(url.startswith("file:") for url in asked) == 1


def test_keys_reach_every_number_and_point(page: Driver) -> None:
    numbers = page.find_elements(By.CSS_SELECTOR, "#main tbody td [data-tip]")
    assert [each.get_attribute("tabindex") for each in numbers].count("-1") == len(numbers) - 1
    first = numbers[0]
    page.execute_script("arguments[0].focus()", first)
    tip = page.find_element(By.ID, "tip")
    assert tip.is_displayed()
    assert "records/source.json, memory.weights_bytes" in tip.text
    for key, expected in (
        (Keys.ARROW_DOWN, "fp16, accuracy loss %"),
        (Keys.ARROW_RIGHT, "fp16, memory % of FP16: 100.0"),
        (Keys.END, "fp16, prefill tok/s at 1"),
        (Keys.HOME, "fp16, accuracy loss %: 0.01 (−0.05 to 0.07) · n = 65,536 · no measurable loss · p = 1 after Holm"),
    ):
        page.switch_to.active_element.send_keys(key)
        assert expected in tip.text
    assert page.switch_to.active_element.get_attribute("aria-describedby") == "tip"
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()
    mark = page.find_element(By.CSS_SELECTOR, '.pareto.wide .mark[data-variant="w4a16"]')
    page.execute_script("arguments[0].focus()", mark)
    assert "w4a16: accuracy loss 0.92 %" in tip.text
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert "w4a16-experts" in tip.text


def test_every_number_leads_to_its_record(page: Driver, run: Path) -> None:
    links = page.execute_script(
        "return [...document.querySelectorAll('#main a.value')].map((link) => link.getAttribute('href'))"
    )
    assert len(links) > 80
    for link in links:
        file, _, field = unquote(link).partition("#")
        value = json.loads((run / file).read_text())
        for part in field.split("."):
            value = value[part]
        assert value is not None


def test_a_leaderboard_sorts_and_filters(page: Driver, run: Path) -> None:
    page.get((run / "board" / "leaderboard.html").as_uri())
    assert shown(page)[0] == "fp16"
    assert shown(page)[-2:] == ["faulty", "source"]
    choose(page, "memory", "40")
    assert set(shown(page)) == {"w4a16", "pruned-8-w4a16", "faulty"}
    link = page.execute_script("return document.querySelector('#main a.value').getAttribute('href')")
    assert (run / "board" / link.partition("#")[0]).resolve().parent == (run / "records").resolve()


def wait_for(path: Path) -> bytes:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if path.is_file() and path.stat().st_size:
            return path.read_bytes()
        time.sleep(0.05)
    pytest.fail(f"{path.name} was not downloaded")


def press(page: Driver, selector: str) -> None:
    page.execute_script("arguments[0].click()", page.find_element(By.CSS_SELECTOR, selector))


def test_downloads_are_whole_files(page: Driver, run: Path) -> None:
    press(page, 'button[data-file="quickstart-pareto"][data-save="svg"]')
    drawing = ElementTree.fromstring(wait_for(page.downloads / "quickstart-pareto.svg"))
    texts = [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert {"w4a16", "decode speed:", "from 3×"} <= set(texts)
    press(page, 'button[data-file="quickstart-decode-8"][data-save="png"]')
    png = wait_for(page.downloads / "quickstart-decode-8.png")
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">I", png[16:20]) == (720,)
    press(page, 'button[data-file="quickstart-pareto"][data-save="png"]')
    picture = Image.open(io.BytesIO(wait_for(page.downloads / "quickstart-pareto.png"))).convert("RGBA")
    assert picture.size == (1800, 940)
    corners = {picture.getpixel((x, y)) for x in (0, 1799) for y in (0, 939)}
    assert corners == {(255, 255, 255, 255)}
    press(page, 'button[data-file="quickstart-layer-errors"][data-save="svg"]')
    tiles = ElementTree.fromstring(wait_for(page.downloads / "quickstart-layer-errors.svg"))
    texts = [text.text for text in tiles.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Error of each layer, percent", "faulty", "82.0", "7"} <= set(texts)
    press(page, 'button[data-file="quickstart-layer-errors"][data-save="png"]')
    picture = Image.open(io.BytesIO(wait_for(page.downloads / "quickstart-layer-errors.png"))).convert("RGB")
    assert len(picture.getcolors(1 << 20) or []) > 8, "every class has its background"
    press(page, "a[download$='.csv']")
    assert wait_for(page.downloads / "quickstart.csv") == (run / "matrix.csv").read_bytes()


@pytest.mark.parametrize("dark", [False, True])
def test_a_drawing_keeps_the_theme_it_was_saved_in(page: Driver, dark: bool) -> None:
    look(page, width=1280, dark=dark)
    save: Callable[[str], None] = lambda selector: press(page, selector)  # noqa: E731
    target = page.downloads / "quickstart-prefill-1.svg"
    target.unlink(missing_ok=True)
    save('button[data-file="quickstart-prefill-1"][data-save="svg"]')
    page.get_log("browser")
    wait_for(target)
    page.get(target.as_uri())
    fill = page.execute_script("return getComputedStyle(document.querySelector('rect')).fill")
    assert fill == ("rgb(28, 31, 37)" if dark else "rgb(255, 255, 255)")
    assert page.get_log("browser") == []
