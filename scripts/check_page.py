"""Opens the server's page in headless Chromium, classifies a sentence there and compares what it shows with /predict.

    quetsch serve --model DIR --port 3000 &
    python scripts/check_page.py [--url http://127.0.0.1:3000] [--shots FOLDER]

Needs Debian's `chromium` alone. Both languages, light and dark; pictures of them go to FOLDER.
"""

import argparse
import html
import json
import re
import subprocess
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

SENTENCE = "I lost my card, what can I do?"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--virtual-time-budget=5000", "--window-size=800,700"]


def chromium(url, *flags, lang="en", dark=False):
    with tempfile.TemporaryDirectory() as profile:
        command = ["chromium", *FLAGS, f"--user-data-dir={profile}", f"--lang={lang}", f"--accept-lang={lang}",
                   *(["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []), *flags, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:3000")
    parser.add_argument("--shots", type=Path)
    args = parser.parse_args()
    body = json.dumps({"inputs": SENTENCE, "top_k": 5}).encode()
    request = urllib.request.Request(f"{args.url}/predict", body, {"Content-Type": "application/json"})
    want = json.load(urllib.request.urlopen(request))
    want = [(p["label"], f"{100 * p['score']:.1f} %") for p in want]
    page = f"{args.url}/#{urllib.parse.urlencode({'text': SENTENCE}, quote_via=urllib.parse.quote)}"
    for lang, button in [("en", "Classify"), ("zh-CN", "分类")]:
        dom = chromium(page, "--dump-dom", lang=lang)
        found = re.findall(r"<li><div><span>(.*?)</span><span>(.*?)</span></div><meter.*?</li>", dom)
        assert [(html.unescape(l), html.unescape(s)) for l, s in found] == want, (found, want)
        assert f">{button}</button>" in dom, lang
        print(f"ok  {lang}: {len(found)} bars, the first {found[0][0]} {found[0][1]}")
    if args.shots:
        args.shots.mkdir(parents=True, exist_ok=True)
        for name, lang, dark in [("light", "en", False), ("dark-zh", "zh-CN", True)]:
            chromium(page, f"--screenshot={args.shots}/{name}.png", lang=lang, dark=dark)
            print(args.shots / f"{name}.png")


if __name__ == "__main__":
    main()
