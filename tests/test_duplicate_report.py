"""The near-duplicate report, in a real browser: Debian's chromium, driven by selenium."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from embell.cli.duplicate_report import Group, Member, Report, write_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
NO_BROWSER = "these tests need a browser: apt-get install chromium chromium-driver"

HOSTILE = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 1'> <!-- <b>\u2028 {{data}} &amp; ]]>"
GROUPS = [
    Group(
        "a",
        "The quick brown fox jumps over the lazy dog",
        [
            Member("a1", "The quick red fox leaps over the lazy dog", 0.9344, "semantic", "a"),
            Member("a2", "THE quick brown fox  jumps over the lazy dog", 1.0, "exact", "a"),
        ],
    ),
    Group("b", HOSTILE, [Member("b<b>1", f"{HOSTILE} more", 0.81, "lexical", "b")]),
    Group("c", "Shares fell", [Member("c1", "Shares rose", 0.8999, "semantic", "c")]),
]
REPORT = Report(
    title=f"Corpus {HOSTILE}",
    documents=12345,
    kept=12341,
    dropped={"exact": 1, "lexical": 1, "semantic": 2},
    thresholds={"lexical": 0.7, "semantic": 0.9},
    rule="greedy",
    keep="the first",
    histogram={"semantic": [(0.8, 0.85, 40), (0.85, 0.9, 20), (0.9, 0.95, 7), (0.95, 1.0, 0)]},
    groups=GROUPS,
    all_groups=3,
    capped=0,
    notes=["a note"],
)
Show = Callable[[Report], Path]


def many(number: int, members: int = 1) -> Report:
    groups = [
        Group(
            f"g{i}",
            f"text {i} of many",
            [Member(f"g{i}.{j}", f"text {i} of lots", 0.95, "semantic", f"g{i}") for j in range(members)],
        )
        for i in range(number)
    ]
    return replace(REPORT, groups=groups, all_groups=number)


def test_a_browser_is_installed() -> None:
    """Without one the tests of the page fail; each says what to install."""
    if not CHROMIUM or not DRIVER:
        pytest.fail(NO_BROWSER, pytrace=False)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    if not CHROMIUM or not DRIVER:
        pytest.fail(NO_BROWSER, pytrace=False)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    folder = tmp_path_factory.mktemp("browser")
    for argument in (
        "headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "disable-background-networking", "window-size=1280,900",
        f"user-data-dir={folder}",
    ):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))  # named, so that none is downloaded
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def show(browser: webdriver.Chrome, tmp_path: Path) -> Iterator[Show]:
    """Writes a report and opens it; what the browser remembers is forgotten afterwards."""

    def write_and_open(report: Report) -> Path:
        path = tmp_path / "report.html"
        with path.open("w", encoding="utf-8", newline="\n") as file:
            write_report(report, file)
        browser.get(path.as_uri())
        return path

    for kind in ("browser", "performance"):
        browser.get_log(kind)  # what earlier tests left
    yield write_and_open
    browser.execute_script("localStorage.clear()")


def texts(browser: webdriver.Chrome, selector: str) -> list[str]:
    """The whole text of each element, as the page holds it, of those that are not hidden."""
    found = "[...document.querySelectorAll(arguments[0])].filter((one) => one.checkVisibility())"
    return list(browser.execute_script(f"return {found}.map((one) => one.textContent)", selector))


def ids(browser: webdriver.Chrome) -> list[str]:
    """The ids of the dropped texts that are listed, in order."""
    return texts(browser, ".side:last-child bdi")


def press(browser: webdriver.Chrome, *keys: str) -> None:
    ActionChains(browser).send_keys(*keys).perform()


def until(browser: webdriver.Chrome, condition: Callable[[], bool]) -> None:
    WebDriverWait(browser, 60, poll_frequency=0.05).until(lambda _: condition())


def downloaded(browser: webdriver.Chrome, folder: Path) -> list[Any]:
    folder.mkdir()
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    browser.find_element(By.ID, "download").click()
    path = folder / "decisions.jsonl"
    until(browser, path.exists)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- what the page loads and runs -----------------------------------------------------------------


def test_the_page_loads_without_errors_and_asks_the_network_for_nothing(browser: webdriver.Chrome, show: Show) -> None:
    path = show(REPORT)
    press(browser, "j", "d", "?", Keys.ESCAPE, "u")
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    own = [
        one for one in asked if not one["documentURL"].startswith(("chrome:", "chrome-untrusted:"))
    ]  # the browser's start page is its own affair
    assert [one["request"]["url"] for one in own] == [path.as_uri()]


@pytest.mark.parametrize(
    ("code", "directive"),
    [
        ("new Image().src = 'http://127.0.0.1:9/x.png'", "img-src"),
        ("fetch('http://127.0.0.1:9/')", "connect-src"),
        (
            "const style = document.createElement('style'); style.textContent = 'p {}'; document.body.append(style)",
            "style-src-elem",
        ),
        ("document.body.innerHTML = '<p>'", "require-trusted-types-for"),
        ("document.body.setAttribute('onclick', '1')", "require-trusted-types-for"),
    ],
)
def test_the_policy_of_the_page_stops_whatever_would_load_or_run(
    browser: webdriver.Chrome, show: Show, code: str, directive: str
) -> None:
    show(REPORT)
    script = f"""const done = arguments[0];
        document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
        (async () => {{ {code} }})().catch(() => 0);
        setTimeout(() => done("nothing was stopped"), 5000)"""
    assert browser.execute_async_script(script) == directive


def test_hostile_text_is_shown_as_text_and_runs_nothing(browser: webdriver.Chrome, show: Show) -> None:
    show(REPORT)
    assert browser.title == f"Corpus {HOSTILE}"
    assert texts(browser, "h1") == [f"Corpus {HOSTILE}"]
    assert texts(browser, ".text")[4:6] == [HOSTILE, f"{HOSTILE} more"]
    assert "b<b>1" in ids(browser)
    assert browser.execute_script("return document.querySelectorAll('img, b, main script').length") == 0
    assert browser.execute_script("return window.hit") is None
    assert browser.get_log("browser") == []


def test_texts_with_half_a_surrogate_pair_can_be_written_and_shown(browser: webdriver.Chrome, show: Show) -> None:
    show(replace(REPORT, groups=[Group("a", "half \ud800 pair", [Member("b", "half \udc00 pair", 0.95, "semantic", "a")])]))
    codes = browser.execute_script("return [...document.querySelectorAll('.text')].map((one) => one.textContent.charCodeAt(5))")
    assert codes == [0xD800, 0xDC00]


def test_the_same_report_gives_the_same_bytes() -> None:
    first, second = io.StringIO(), io.StringIO()
    write_report(REPORT, first)
    write_report(REPORT, second)
    assert first.getvalue() == second.getvalue()


@pytest.mark.parametrize(
    "member", [Member("b", "text", 1.0, "exact", "other"), Member("b", "text", float("nan"), "semantic", "a")]
)
def test_a_member_of_another_group_or_without_a_score_is_refused(member: Member) -> None:
    with pytest.raises(ValueError, match=r"listed under a|not JSON compliant"):
        write_report(replace(REPORT, groups=[Group("a", "text", [member])]), io.StringIO())


# --- what the page says ---------------------------------------------------------------------------


def test_totals_thresholds_and_counts_are_right(browser: webdriver.Chrome, show: Show) -> None:
    show(replace(REPORT, all_groups=9, capped=2))
    figures = dict(zip(texts(browser, "#figures dt"), texts(browser, "#figures dd"), strict=True))
    assert figures == {
        "documents": "12,345", "kept": "12,341", "dropped": "4", "dropped, exact": "1", "dropped, lexical": "1",
        "dropped, semantic": "2", "groups": "9",
    }  # fmt: skip
    settings = dict(zip(texts(browser, "#settings dt"), texts(browser, "#settings dd"), strict=True))
    assert settings == {
        "Threshold, lexical": "Jaccard 0.70 or more",
        "Threshold, semantic": "cosine 0.90 or more",
        "Rule": "greedy",
        "Kept of each group": "the first",
    }
    assert texts(browser, "#notes li") == [
        "a note",
        "2 documents with very many partners: only the link to the kept one is among the pairs.",
    ]
    assert texts(browser, "#shown") == ["3 of 9 groups are in this report."]
    assert texts(browser, "#counter") == ["0 of 4 judged"]


def test_each_pair_says_why_it_is_one(browser: webdriver.Chrome, show: Show) -> None:
    show(REPORT)
    assert texts(browser, ".why") == [
        "semantic: cosine 0.934 ≥ 0.90",
        "exact copy after normalising Unicode, case and white space",
        "lexical: Jaccard 0.81 ≥ 0.70",
        "semantic: cosine 0.8999 < 0.90, linked through others",
    ]


def test_the_histogram_has_its_bars_its_threshold_and_a_table(browser: webdriver.Chrome, show: Show) -> None:
    show(REPORT)
    assert texts(browser, "figcaption") == ["semantic: 67 pairs"]
    heights = browser.execute_script("return [...document.querySelectorAll('.bar')].map((bar) => bar.height.baseVal.value)")
    assert heights == pytest.approx([100, 50, 17.5, 0])
    assert len(browser.find_elements(By.CSS_SELECTOR, ".bar.above")) == 2
    mark, third = browser.execute_script(
        "return [document.querySelector('.mark').x1.baseVal.value, document.querySelectorAll('.bar')[2].x.baseVal.value]"
    )
    assert mark == pytest.approx(third, abs=1)
    assert "7 of them in bars at or above the threshold 0.90" in browser.find_element(By.TAG_NAME, "svg").accessible_name
    browser.find_element(By.CSS_SELECTOR, "figure summary").click()
    cells = texts(browser, "figure td")
    assert cells == ["0.80 to 0.85", "40", "0.85 to 0.90", "20", "0.90 to 0.95", "7", "0.95 to 1.00", "0"]


def test_a_report_without_duplicates_says_so(browser: webdriver.Chrome, show: Show) -> None:
    show(replace(REPORT, kept=12345, dropped={}, histogram={}, groups=[], all_groups=0))
    assert texts(browser, "#nothing") == ["No duplicates were found."]
    assert texts(browser, "#review, .pair, svg") == []
    assert browser.get_log("browser") == []


# --- differences ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "dropped", "only_kept", "only_dropped"),
    [
        ("The quick brown fox jumps.", "The quick red fox leaps.", ["brown", "jumps"], ["red", "leaps"]),
        ("one two three four", "one four", ["two three"], []),
        ("It's five", "It's  six\n", ["five"], ["six"]),
        ("Same  words", "Same words", [], []),
        ("Case COUNTS", "Case counts", ["COUNTS"], ["counts"]),
        ("今天天气很好", "今天天气不好", ["很"], ["不"]),
        ("東京タワーへ行く", "東京ドームへ行く", ["タワ"], ["ド", "ム"]),
        ("الطقس اليوم مشمس", "الطقس غدا مشمس", ["اليوم"], ["غدا"]),
        ("नमस्ते दुनिया", "नमस्ते भारत", ["दुनिया"], ["भारत"]),
        ("a 👩‍🚀 b", "a 👨‍🚀 b", ["👩‍🚀"], ["👨‍🚀"]),
        ("", "all new", [], ["all new"]),
    ],
)
def test_exactly_the_differing_words_are_marked(
    browser: webdriver.Chrome, show: Show, kept: str, dropped: str, only_kept: list[str], only_dropped: list[str]
) -> None:
    show(replace(REPORT, groups=[Group("a", kept, [Member("b", dropped, 0.95, "semantic", "a")])]))
    assert texts(browser, ".text") == [kept, dropped]
    assert texts(browser, ".pair del") == only_kept
    assert texts(browser, ".pair ins") == only_dropped


def common(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence, by the book."""
    row = [0] * (len(b) + 1)
    for one in a:
        last = row
        row = [0]
        for place, other in enumerate(b):
            row.append(last[place] + 1 if one == other else max(row[-1], last[place + 1]))
    return row[-1]


def test_what_is_not_marked_is_a_longest_common_subsequence(browser: webdriver.Chrome, show: Show) -> None:
    show(REPORT)
    chance = random.Random(0)
    pairs = [[" ".join(chance.choices("abcd", k=chance.randrange(30))) for _ in range(2)] for _ in range(300)]
    found = browser.execute_script("return arguments[0].map(([kept, dropped]) => compare(kept, dropped))", pairs)
    for (kept, dropped), result in zip(pairs, found, strict=True):
        assert ["".join(part for _, part in result[side]) for side in ("kept", "dropped")] == [kept, dropped]
        same = [" ".join(part for differs, part in result[side] if not differs).split() for side in ("kept", "dropped")]
        assert same[0] == same[1]
        assert len(same[0]) == common(kept.split(), dropped.split())


def test_texts_of_100_kb_are_folded_around_their_differences_and_shown_whole_on_demand(
    browser: webdriver.Chrome, show: Show
) -> None:
    chance = random.Random(0)
    words = [f"word{chance.randrange(3000)}" for _ in range(13_000)]
    changed = [*words[:6000], "inserted", *words[6000:]]
    kept, dropped = " ".join(words), " ".join(changed)
    other = " ".join(f"other{chance.randrange(9000)}" for _ in range(13_000))
    assert len(kept) > 100_000
    members = [Member("b", dropped, 0.99, "semantic", "a"), Member("c", other, 0.9, "semantic", "a")]
    show(replace(REPORT, groups=[Group("a", kept, members)]))
    until(browser, lambda: "These texts differ in so much" in "".join(texts(browser, ".pair:last-child")))
    assert texts(browser, ".pair:not(:last-child) ins") == ["inserted"]
    assert texts(browser, ".pair:not(:last-child) del") == []
    assert max(map(len, texts(browser, ".text"))) < 2000
    assert texts(browser, ".text")[0].startswith(kept[:100])
    folded = browser.execute_script("return fold(compare(...arguments).dropped)", kept, dropped)
    assert sum(part if differs is None else len(part) for differs, part in folded) == len(dropped)
    press(browser, "j", "m")
    assert texts(browser, ".text")[:2] == [kept, dropped]
    assert texts(browser, ".more") == ["Show less", "Show more"]


# --- review ---------------------------------------------------------------------------------------


def test_a_review_by_keyboard_downloads_exactly_its_decisions(browser: webdriver.Chrome, show: Show, tmp_path: Path) -> None:
    show(REPORT)
    assert not browser.find_element(By.ID, "download").is_enabled()
    press(browser, "j", "d", "n", "j", "d", "k", Keys.ARROW_UP, Keys.ARROW_DOWN, "n")
    assert texts(browser, "#counter") == ["4 of 4 judged"]
    press(browser, "u")  # the decision just made, not that on the pair where it led to
    assert texts(browser, ".pair[aria-current] bdi") == ["b", "b<b>1"]
    press(browser, "k", "n")
    assert downloaded(browser, tmp_path / "downloads") == [
        {"id_a": "a", "id_b": "a1", "score": 0.9344, "kind": "semantic", "duplicate": True},
        {"id_a": "a", "id_b": "a2", "score": 1.0, "kind": "exact", "duplicate": False},
        {"id_a": "c", "id_b": "c1", "score": 0.8999, "kind": "semantic", "duplicate": True},
    ]


def test_a_review_by_mouse_can_be_undone(browser: webdriver.Chrome, show: Show) -> None:
    show(REPORT)
    yes, no = browser.find_elements(By.CSS_SELECTOR, ".actions button")[:2]
    no.click()
    yes.click()
    assert [button.get_attribute("aria-pressed") for button in (yes, no)] == ["true", "false"]
    assert texts(browser, "#counter") == ["1 of 4 judged"]
    browser.find_element(By.CSS_SELECTOR, ".actions button:nth-child(3)").click()
    assert [button.get_attribute("aria-pressed") for button in (yes, no)] == ["false", "false"]
    assert texts(browser, "#counter") == ["0 of 4 judged"]


def test_keys_do_nothing_while_typing_or_when_switched_off(browser: webdriver.Chrome, show: Show) -> None:
    show(REPORT)
    browser.find_element(By.ID, "query").send_keys("jd")
    browser.find_element(By.ID, "query").clear()
    until(browser, lambda: len(ids(browser)) == 4)
    press(browser, "j")
    ActionChains(browser).key_down(Keys.CONTROL).send_keys("d").key_up(Keys.CONTROL).perform()
    browser.find_element(By.ID, "keys-button").click()
    browser.find_element(By.ID, "keys-on").click()
    press(browser, Keys.ESCAPE, "j", "d", "d")
    assert texts(browser, "#counter") == ["0 of 4 judged"]


def test_decisions_survive_a_reload_and_hold_in_other_reports_on_the_same_texts(
    browser: webdriver.Chrome, show: Show, tmp_path: Path
) -> None:
    show(REPORT)
    press(browser, "j", "d", "n")
    browser.refresh()
    assert texts(browser, "#counter") == ["2 of 4 judged"]
    assert texts(browser, "[aria-pressed=true]") == ["Duplicate", "Not a duplicate"]
    other = [replace(GROUPS[0], members=[replace(GROUPS[0].members[0], score=0.95), replace(GROUPS[0].members[1], text="new")])]
    show(replace(REPORT, groups=other))
    assert [row["duplicate"] for row in downloaded(browser, tmp_path / "downloads")] == [True]


def test_without_storage_the_review_works_and_the_page_warns(browser: webdriver.Chrome, show: Show, tmp_path: Path) -> None:
    source = "Object.defineProperty(window, 'localStorage', {configurable: true, get() { throw new Error('no'); }})"
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    try:
        show(REPORT)
        press(browser, "j", "d")
        assert len(texts(browser, "#unkept")) == 1
        assert len(downloaded(browser, tmp_path / "downloads")) == 1
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
        browser.refresh()
    assert texts(browser, "#unkept") == []


def test_precision_is_estimated_from_the_decisions_by_kind(browser: webdriver.Chrome, show: Show) -> None:
    show(many(10))
    press(browser, "j", *"dddddddnn")
    browser.find_element(By.CSS_SELECTOR, "#review summary").click()
    assert texts(browser, "#precision tbody :is(th, td)") == [
        "semantic",
        "7 of 9",
        "77.8\u00a0%",
        "45 to 94\u00a0%",
    ]  # Wilson's interval


# --- finding one's way ----------------------------------------------------------------------------


def test_filters_by_kind_score_text_and_decision(browser: webdriver.Chrome, show: Show) -> None:
    show(REPORT)
    press(browser, "j", "d")
    boxes = {box.get_attribute("value"): box for box in browser.find_elements(By.CSS_SELECTOR, "#kinds input")}
    boxes["semantic"].click()
    assert ids(browser) == ["a2", "b<b>1"]
    boxes["semantic"].click()
    least, most, query = (browser.find_element(By.ID, name) for name in ("least", "most", "query"))
    least.send_keys("0.85")
    most.send_keys("0.9344")
    until(browser, lambda: ids(browser) == ["a1", "c1"])
    least.clear()
    most.clear()
    query.send_keys("LEAPS")
    until(browser, lambda: ids(browser) == ["a1"])
    query.clear()
    query.send_keys("nowhere")
    until(browser, lambda: texts(browser, "#found") == ["No pair matches these filters."])
    query.clear()
    Select(browser.find_element(By.ID, "judged")).select_by_value("true")
    until(browser, lambda: ids(browser) == ["a1"])


def test_a_click_right_after_a_search_counts(browser: webdriver.Chrome, show: Show) -> None:
    """Leaving the search field tells of a change once more: the list must not be made anew under the mouse."""
    show(REPORT)
    browser.find_element(By.ID, "query").send_keys("leaps")
    until(browser, lambda: ids(browser) == ["a1"])
    browser.find_element(By.CSS_SELECTOR, ".actions button").click()
    assert texts(browser, "#counter") == ["1 of 4 judged"]


def test_the_order_of_pairs_can_be_chosen(browser: webdriver.Chrome, show: Show) -> None:
    show(REPORT)
    order = Select(browser.find_element(By.ID, "order"))
    expected = {
        "low": ["b<b>1", "c1", "a1", "a2"],
        "high": ["a2", "a1", "c1", "b<b>1"],
        "size": ["a1", "a2", "b<b>1", "c1"],
    }
    for name, rows in expected.items():
        order.select_by_value(name)
        assert ids(browser) == rows, name
    show(many(40))
    given = ids(browser)
    Select(browser.find_element(By.ID, "order")).select_by_value("random")
    assert ids(browser) != given
    assert sorted(ids(browser)) == sorted(given)


def test_of_5000_groups_50_pairs_are_on_the_page_and_keys_lead_to_the_next(browser: webdriver.Chrome, show: Show) -> None:
    show(many(5000, members=2))
    assert texts(browser, "#found") == ["Pairs 1 to 50 of 10,000, in 5,000 groups"]
    assert len(ids(browser)) == 50
    press(browser, *"j" * 51)
    assert texts(browser, ".pair[aria-current] bdi") == ["g25", "g25.0"]
    assert browser.execute_script("return document.activeElement === document.querySelector('.pair[aria-current]')")
    assert texts(browser, "#page") == ["Page 2 of 200"]
    browser.find_element(By.ID, "next").click()
    assert ids(browser)[0] == "g50.0"
    assert len(ids(browser)) == 50
    press(browser, "k")
    assert texts(browser, ".pair[aria-current] bdi") == ["g49", "g49.1"]


# --- for everybody --------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_aa_asks_for(browser: webdriver.Chrome, show: Show, scheme: str) -> None:
    media = {
        "features": [{"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": "reduce"}]
    }
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        show(REPORT)
        press(browser, "j", "d")
        low = browser.execute_script("""
            const parts = (color) => color.match(/[\\d.]+/g).map(Number);
            const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
              .map((v) => (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4))
              .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
            const behind = (one) => {
              const color = parts(getComputedStyle(one).backgroundColor);
              return color[3] === 0 ? behind(one.parentElement) : color;
            };
            const texts = [...document.body.querySelectorAll("*")].filter((one) => one.checkVisibility() &&
              !one.matches("option, :disabled") && [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
            if (texts.length < 40) return ["too few texts were looked at", texts.length];
            return texts.map((one) => {
              const style = getComputedStyle(one), ink = one.closest("svg") ? style.fill : style.color;
              const [a, b] = [light(parts(ink)), light(behind(one))].sort((x, y) => y - x);
              return [one.tagName, one.className.baseVal ?? one.className, (a + .05) / (b + .05)];
            }).filter(([, , contrast]) => contrast < 4.5)""")
        assert low == []
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_every_control_has_a_name_and_the_language_is_given(browser: webdriver.Chrome, show: Show) -> None:
    show(REPORT)
    browser.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    controls = browser.find_elements(By.CSS_SELECTOR, "main :is(button, input, select, progress, svg, form, nav)")
    assert len(controls) > 20
    assert [one.get_attribute("outerHTML") for one in controls if one.is_displayed() and not one.accessible_name] == []
    assert browser.execute_script("return document.documentElement.lang") == "en"
    assert {one.get_attribute("dir") for one in browser.find_elements(By.CSS_SELECTOR, ".text")} == {"auto"}
    levels = browser.execute_script(
        "return [...document.querySelectorAll('main :is(h2, h3), h1')].map((one) => Number(one.tagName[1]))"
    )
    assert all(later - earlier <= 1 for earlier, later in zip([0, *levels], levels, strict=False))


def test_a_phone_shows_the_texts_below_each_other_without_scrolling_sideways(browser: webdriver.Chrome, show: Show) -> None:
    groups = [*GROUPS, Group("long" * 40, "w" * 3000, [Member("i" * 200, "w" * 2999, 0.95, "semantic", "long" * 40)])]
    size = {"width": 360, "height": 700, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        show(replace(REPORT, groups=groups, rule="r" * 200, notes=["n" * 200]))
        browser.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        press(browser, "j", *"ddddn", "m")
        wide, room = browser.execute_script("const root = document.documentElement; return [root.scrollWidth, root.clientWidth]")
        assert room <= 360
        assert wide <= room
        kept, dropped = (one.rect for one in browser.find_elements(By.CSS_SELECTOR, ".side")[:2])
        assert dropped["y"] >= kept["y"] + kept["height"]
        assert dropped["x"] == kept["x"]
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    show(REPORT)
    kept, dropped = (one.rect for one in browser.find_elements(By.CSS_SELECTOR, ".side")[:2])
    assert dropped["y"] == kept["y"]
    assert dropped["x"] >= kept["x"] + kept["width"]
