"""Opens report pages in headless Chromium, wide and as narrow as a phone, and looks for what is broken.

    python scripts/check_report.py REPORT.html... [--shots FOLDER]

Every plot has a size, every mark and number of it is on the canvas, labels do not lie on each other, nothing is NaN,
nothing is fetched, and the page never has to be scrolled sideways. Light and dark; pictures go to FOLDER.
Needs Debian's `chromium` alone (`fonts-noto-cjk` for Chinese).
"""

import argparse
import html
import json
import re
import tempfile
from pathlib import Path

from check_page import chromium

WIDTHS = {"wide": 1200, "phone": 390}
# What a phone shows before anybody scrolls, and room for the whole page.
SCREEN, WHOLE = 844, 9000

PROBE = """<script>
const box = e => e.getBoundingClientRect();
const inside = (a, b) => a.left >= b.left - 2 && a.right <= b.right + 2 && a.top >= b.top - 2 && a.bottom <= b.bottom + 2;
const overlap = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4;
const found = [];
for (const svg of document.querySelectorAll("svg")) {
  const name = svg.getAttribute("aria-label"), b = box(svg);
  if (b.width < 200 || b.height < 100) found.push(`${name}: ${b.width} x ${b.height} px`);
  if (!svg.querySelector("circle, polyline")) found.push(`${name}: nothing drawn`);
  for (const e of svg.querySelectorAll("circle, text, line")) {
    const r = box(e), what = `${e.tagName} ${e.textContent.trim() || e.getAttribute("class")}`;
    if (!(r.width + r.height > 0)) found.push(`${name}: ${what} has no size`);
    if (!inside(r, {left: b.left - 4, right: b.right + 4, top: b.top - 4, bottom: b.bottom + 4})) found.push(`${name}: ${what} leaves the canvas`);
  }
  for (const kind of ["label", "tick"]) {
    const texts = [...svg.querySelectorAll("text." + kind)];
    texts.forEach((t, i) => texts.slice(0, i).forEach(o => overlap(box(t), box(o)) && found.push(`${name}: ${t.textContent} lies on ${o.textContent}`)));
  }
}
for (const word of ["NaN", "undefined", "Infinity"]) if (document.body.innerText.includes(word)) found.push(`the page says ${word}`);
if (document.documentElement.scrollWidth > innerWidth) found.push(`${document.documentElement.scrollWidth} px wide on a screen of ${innerWidth}`);
const fetched = performance.getEntriesByType("resource").map(r => r.name);
if (fetched.length) found.push(`it fetches ${fetched}`);
const summary = box(document.querySelector(".summary"));
parent.postMessage({plots: document.querySelectorAll("svg").length, summary: Math.round(summary.bottom), height: document.documentElement.scrollHeight, found}, "*");
</script>"""

# The page stands in a frame, because a window may be no narrower than 500 px.
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><style>body { margin: 0 } iframe { border: 0; width: %dpx; height: %dpx }</style>
<pre id="told" hidden></pre><script>onmessage = m => { told.textContent = JSON.stringify(m.data) }</script><iframe src="%s"></iframe>"""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--shots", type=Path)
    args = parser.parse_args()
    bad = [line for report in args.reports for line in check(report, args.shots)]
    print("\n".join(bad))
    raise SystemExit(len(bad) > 0)


def check(report, shots):
    text = report.read_text()
    bad = [f"{report}: names {link}" for link in re.findall(r'(?:src|href)="[^#"][^"]*"|url\([^)]*\)|<script', text)]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "page.html").write_text(text.replace("</body>", PROBE + "</body>"))
        for name, width in WIDTHS.items():
            frame = folder / f"{name}.html"
            frame.write_text(FRAME % (width, SCREEN if name == "phone" else 800, "page.html"))
            dom = chromium(frame.as_uri(), "--dump-dom")
            told = json.loads(html.unescape(re.search(r'<pre id="told" hidden="">(.*?)</pre>', dom, re.S)[1]))
            print(f"{report} {name}: {told['plots']} plots, summary down to {told['summary']} px, {told['height']} px in all")
            bad += [f"{report} {name}: {line}" for line in told["found"]]
            if told["summary"] > SCREEN:
                bad.append(f"{report} {name}: the summary ends at {told['summary']} px, below one screen of {SCREEN}")
            if shots:
                shots.mkdir(parents=True, exist_ok=True)
                frame.write_text(FRAME % (width, min(told["height"], WHOLE), "page.html"))
                size = f"--window-size={max(width, 500)},{min(told['height'], WHOLE)}"
                for theme in ["light", "dark"]:
                    shot = shots / f"{report.stem}-{name}-{theme}.png"
                    chromium(frame.as_uri(), size, f"--screenshot={shot}", dark=theme == "dark")
                    print(shot)
    return bad


if __name__ == "__main__":
    main()
