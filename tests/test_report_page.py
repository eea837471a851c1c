"""How the report's page behaves, in a real headless Chromium."""

import json

import browser
import pytest

from common import report
from tests.report_runs import HOSTILE, collect, label, say, small_run, trajectory, write


LONG = "exit 1\n" + "\n".join(f"line {n} of the log" for n in range(200))


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    """Two iterations. Collected: one of four turns, hostile and long output, two labels that differ; 150 plain ones."""
    home = small_run(tmp_path_factory.mktemp("runs") / "laptop")
    turns = [("student", "grep -rn 'def total'", HOSTILE), ("student", "sed -i 's/min(x)/max(x)/' a.py", LONG),
             ("teacher", "pytest", "exit 0\n..."), ("student", "submit", None)]  # fmt: skip
    one = trajectory("a__b-1", 1, turns, issue="The total is wrong. " + HOSTILE)
    labels = [label(one, 0, say("grep -rn 'def total'", "Search."), True),
              label(one, 1, say("sed -i 's/min(x)/min(x, 0)/' a.py"), False),
              label(one, 2, say("pytest"), None, "executed"),
              label(one, 3, say("pytest " + HOSTILE), False)]  # fmt: skip
    plain = [
        trajectory(f"plain-{n:03d}", 1, [("teacher", "submit", None)], issue=("Long " * 60 + f"needle{n}x"))
        for n in range(150)
    ]
    collect(home / "iter_001", [one, *plain], labels)
    report.report([home], home / "report.html")
    return home / "report.html"


@pytest.fixture(scope="module")
def chromium():
    if reason := browser.missing():
        pytest.skip(reason)
    with browser.open() as opened:
        yield opened


@pytest.fixture
def page(chromium, page_path):
    """The report, freshly opened at its beginning."""
    chromium.resize(1300, 900)
    chromium.media()
    return opened_at(chromium, page_path, "")


def opened_at(chromium, path, place):
    chromium.go("about:blank")  # an address that differs behind the # alone would not load anew
    chromium.go(path.as_uri() + place)
    chromium.wait("document.documentElement.dataset.ready === 'yes'")
    return chromium


def count(page):
    return page.run("return document.querySelector('#count').textContent")


def choose(page, name, value):
    script = (
        "const select = document.querySelector(`#filters select[name=${arguments[0]}]`);"
        "select.value = arguments[1]; select.dispatchEvent(new Event('change'))"
    )
    page.run(script, name, value)


def wait_title(page, name):
    page.wait(f"document.querySelector('#opened h1')?.textContent === {json.dumps(name)}")


FIRST = "#trajectory/laptop/iter_001/a__b-1.i1.a0"


@pytest.mark.slow
@pytest.mark.browser
class TestBrowser:
    def test_opens_from_disk_and_asks_the_network_for_nothing(self, page):
        assert page.run("return location.protocol") == "file:"
        page.wait("document.querySelectorAll('#overview svg .mark').length > 3")
        assert page.run("return performance.getEntriesByType('resource').length") == 0
        assert page.log() == []  # no error, no refusal of the policy
        assert "laptop: DAgger linear:2" in page.run("return document.querySelector('h1').textContent")
        assert "3/4 = 75 %" in page.run("return document.querySelector('#overview table').innerText")

    def test_the_policy_forbids_scripts_and_the_network(self, page):
        page.run(
            "const s = document.createElement('script'); s.textContent = 'window.ran = 4'; document.body.append(s)"
        )
        page.run("const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i)")
        assert page.run("return fetch('http://127.0.0.1:9/').then(() => 'loaded', () => 'refused')") == "refused"
        assert page.run("return window.ran === undefined")
        assert len([line for line in page.log() if "Content Security Policy" in line["message"]]) >= 3

    def test_hostile_text_stays_text(self, page, page_path):
        opened_at(page, page_path, FIRST)
        page.wait("document.querySelectorAll('.turn').length === 4")
        seen = page.run("return document.querySelector('#turn-0 .observation').innerText")
        assert "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 2'>" in seen
        assert "\u241b[31mred\u27e8U+202E\u27e9{{chunks}}" in seen  # what cannot be seen is shown
        hidden = page.run("return visible('a\\u{e0061}\\u00ad\\u3164b\\u00e9\\u{1f600}')")
        assert hidden == "a\u27e8U+E0061\u27e9\u27e8U+00AD\u27e9\u27e8U+3164\u27e9b\u00e9\U0001f600"
        assert page.run("return document.querySelectorAll('img').length") == 0
        assert page.run("return window.ran === undefined")
        assert page.log() == []

    def test_filters_and_search(self, page, page_path):
        opened_at(page, page_path, "#trajectories")
        assert count(page) == "168 trajectories"  # 151 + 1 collected, 3 x 4 evaluated, 4 tested
        assert page.run("return document.querySelectorAll('.row').length") < 60  # only what is seen
        choose(page, "labels", "differ")
        assert count(page) == "2 of 168 trajectories"
        choose(page, "iteration", "1")
        assert count(page) == "1 of 168 trajectories" and "labels=differ" in page.run("return location.hash")
        choose(page, "labels", "")
        choose(page, "iteration", "")
        choose(page, "what", "evaluated")
        choose(page, "mode", "tests_failed")
        assert count(page) == "8 of 168 trajectories"
        choose(page, "mode", "")
        choose(page, "result", "resolved")
        assert count(page) == "4 of 168 trajectories"
        page.run("[...document.querySelectorAll('#filters button')].at(-1).click()")
        choose(page, "actor", "student")
        assert count(page) == "18 of 168 trajectories"
        choose(page, "actor", "")
        page.press("/", *"PLAIN-01")
        assert count(page) == "10 of 168 trajectories"
        page.run("document.querySelector('#text').value = ''")
        page.press(*"needle149x")  # near the end of a long issue
        page.wait("document.querySelector('#count').textContent === '1 of 168 trajectories'")
        page.press(*"none")
        assert "No trajectory is like that." in page.run("return document.querySelector('#list').innerText")

    def test_a_number_of_the_failure_modes_leads_to_its_trajectories(self, page):
        page.run("document.querySelector('#failures td a[href*=\"iteration=1&mode=tests_failed\"]').click()")
        page.wait("!document.querySelector('#viewer').hidden")
        assert count(page) == "3 of 168 trajectories"

    def test_arms_side_by_side_and_what_a_run_cannot_show(self, chromium, tmp_path):
        """SFT has no state with a turn of the student; a choice of states is no sample of them."""
        homes = [small_run(tmp_path / "dagger", resolved=(0, 1)), small_run(tmp_path / "sft", resolved=(0, 3), mix="teacher")]
        one = trajectory("task-a", 1, [("teacher", "ls", "exit 0"), ("teacher", "submit", None)])
        collect(homes[1] / "iter_001", [one], [label(one, 0, say("ls"), None, "executed")], mix="teacher")
        path = homes[0] / "iter_001/labels.jsonl.manifest.json"
        path.write_text(path.read_text().replace('"seed": 0', '"seed": 0, "label_states": "student"'))
        report.report(homes, tmp_path / "page.html")
        opened_at(chromium, tmp_path / "page.html", "")
        table = chromium.run("return document.querySelector('#failures table').innerText").split("\n")
        assert [line.split("\t")[0] for line in table if "\t" in line] == ["", "resolved", "tests failed"]
        assert "Chosen students on toy:test: tasks, in the mean of 1 runs" in table
        shown = "return document.querySelector('#shift').innerText"
        assert "(--label-states student)" in chromium.run(shown) and "teacher alone acted" not in chromium.run(shown)
        chromium.run("const s = document.querySelector('#shift select'); s.value = 1; s.dispatchEvent(new Event('change'))")
        assert "The teacher alone acted while these tasks were collected" in chromium.run(shown)
        assert "(--label-states" not in chromium.run(shown) and chromium.log() == []

    def test_runs_share_the_scale_of_their_shift(self, chromium, tmp_path):
        homes = [small_run(tmp_path / name, resolved=(0, 1)) for name in ("low", "high")]
        for home, loss in zip(homes, (0.4, 7.0)):
            same = {"trajectory_id": "task-a.i1.a0", "tokens": 5, "before": loss, "after": loss}
            write(home / "iter_001/adapter/label_nll.jsonl", [same | {"turn": 0}, same | {"turn": 1}])
        report.report(homes, tmp_path / "page.html")
        opened_at(chromium, tmp_path / "page.html", "")
        seen = []
        for run in range(2):
            chromium.run("const s = document.querySelector('#shift select'); s.value = arguments[0];"
                         "s.dispatchEvent(new Event('change'))", run)  # fmt: skip
            chromium.wait("document.querySelectorAll('#shift svg').length > 1")
            seen.append(chromium.run("return [...document.querySelectorAll('#shift svg')].slice(0, 2).map((one) =>"
                                     "[...one.querySelectorAll('text')].map((text) => text.textContent))"))  # fmt: skip
        low, high = seen
        assert low == high and all({"6", "8"} & set(texts) for texts in low)

    def test_keys(self, page, page_path):
        opened_at(page, page_path, "#trajectories?what=collected&iteration=1")
        page.press("j")
        wait_title(page, "a__b-1.i1.a0")
        current = "return document.querySelector('.turn.current').id"
        assert page.run(current) == "turn-0"
        page.press("n", "n", "p")
        assert page.run(current) == "turn-1" and page.run("return location.hash") == f"{FIRST}/1"
        page.press("d")
        assert page.run(current) == "turn-3"
        page.press("j")
        wait_title(page, "plain-000.i1.a0")
        page.press("Right")
        wait_title(page, "plain-001.i1.a0")
        page.press("k", "Left")
        wait_title(page, "a__b-1.i1.a0")
        page.press("?")
        assert page.run("return document.querySelector('#help').open")
        page.press("Escape")
        assert not page.run("return document.querySelector('#help').open")
        page.press("/")
        assert page.run("return document.activeElement.id") == "text"
        page.press("j", "Escape")  # typed, not obeyed
        assert page.run("return document.querySelector('#text').value") == "j"
        page.press("Escape")
        assert page.run("return opened") is None

    def test_a_label_stands_beside_what_was_executed_with_the_differences_marked(self, page, page_path):
        opened_at(page, page_path, f"{FIRST}/1")
        page.wait("document.querySelectorAll('.turn').length === 4")
        marked = (
            "return [...document.querySelectorAll(`#turn-1 .action.${arguments[0]} mark`)].map((m) => m.textContent)"
        )
        assert page.run(marked, "student") == ["max"] and page.run(marked, "teacher") == ["min", ", 0"]
        assert "The label has the same command." in page.run("return document.querySelector('#turn-0').innerText")
        assert page.run("return document.querySelector('#turn-2').innerText").count("pytest") == 1  # its own label
        assert (
            page.run("return [...document.querySelectorAll('.strip button')].map((one) => one.textContent).join('')")
            == "SSTS"
        )
        assert page.run("return document.querySelectorAll('.strip .differs').length") == 2

    def test_long_observations_are_folded(self, page, page_path):
        opened_at(page, page_path, f"{FIRST}/1")
        page.wait("document.querySelector('#turn-1 .unfold')")
        seen = "return document.querySelector('#turn-1 .observation').innerText"
        assert "line 199" in page.run(seen) and "line 100 " not in page.run(seen)
        page.press("o")
        assert "line 100 " in page.run(seen)
        page.click("#turn-1 .unfold")
        assert "line 100 " not in page.run(seen)

    def test_deep_links(self, page, page_path):
        opened_at(page, page_path, f"{FIRST}/2")
        wait_title(page, "a__b-1.i1.a0")
        assert page.run("return document.querySelector('.turn.current').id") == "turn-2"
        assert page.run("return document.querySelector('.row[aria-selected=true] .id').textContent") == "a__b-1"
        page.run("location.hash = '#trajectory/laptop/iter_001/gone.i1.a0/0'")
        page.wait("document.querySelector('#opened').innerText.includes('no trajectory of that address')")
        page.run("history.back()")
        wait_title(page, "a__b-1.i1.a0")
        opened_at(page, page_path, "#cost")
        assert page.run("return scrollY") > 500

    def test_light_and_dark(self, page, page_path):
        ground = "getComputedStyle(document.documentElement).backgroundColor"
        light, dark = "rgb(253, 253, 251)", "rgb(20, 22, 26)"

        def is_ground(colour):
            page.wait(f"{ground} === '{colour}'")

        is_ground(light)
        page.dark(True)
        is_ground(dark)
        page.dark(False)
        is_ground(light)
        page.click("#theme")
        is_ground(dark)
        opened_at(page, page_path, "")
        is_ground(dark)  # remembered
        page.click("#theme")
        is_ground(light)
        page.run("localStorage.clear()")

    @pytest.mark.parametrize("width", [360, 700, 1200, 1800])
    def test_nothing_is_wider_than_the_window(self, page, page_path, width):
        page.resize(width, 800)
        for place in ("", "#trajectories", f"{FIRST}/1"):
            opened_at(page, page_path, place)
            if place.startswith(FIRST):
                page.wait("document.querySelectorAll('.turn').length === 4")
            assert page.run("return document.documentElement.scrollWidth") <= width, place

    @pytest.mark.parametrize("dark", [False, True])
    def test_contrast(self, page, page_path, dark):
        """WCAG AA: 4.5 for every text against its ground."""
        page.dark(dark)
        for place in ("", f"{FIRST}/1"):
            opened_at(page, page_path, place)
            if place:
                page.wait("document.querySelectorAll('.turn').length === 4")
            page.wait(f"document.documentElement.dataset.theme === '{'dark' if dark else 'light'}'")
            assert page.run(CONTRAST) == []


CONTRAST = """
const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
const ground = (e) => {
  const colour = numbers(getComputedStyle(e).backgroundColor);
  return colour.length < 4 || colour[3] === 1 ? colour : ground(e.parentElement);
};
const bad = [];
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || !e.checkVisibility() || e.disabled) continue;
  const style = getComputedStyle(e), svg = e instanceof SVGElement;
  const a = light(numbers(svg ? style.fill : style.color)), b = light(ground(svg ? e.closest("svg").parentElement : e));
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) bad.push(`${e.outerHTML.slice(0, 80)} ${ratio.toFixed(2)}`);
}
return bad;
"""
