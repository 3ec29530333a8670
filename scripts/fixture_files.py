"""Writing fixture files."""

import json
import re
import shutil


def dump(path, value):
    """JSON, indented but for lists of numbers, which stay on one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\n[-+.\deE,\s]+\]", lambda m: " ".join(m[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
    path.write_text(text + "\n")


def empty(folder):
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
