"""Parquet files as Hugging Face's `datasets` writes them, with the class names in the file's metadata."""

from datasets import ClassLabel, Dataset, Features, List, Value

INTENTS = ["lost_card", "change_pin", "top_up"]
TAGS = ["O", "B", "I"]

TEXTS = [
    ("my card is lost", 0, [0, 1, 0, 0], 0.5),
    ("a new pin please", 1, [0, 1, 2, 0], 1.25),
    ("", 0, [], 2.0),
    ("größer, \"quoted\"\nand broken", 2, [0, 0, 1, 2], -1e-3),
    ("top up again", 2, [0, 0, -100], 3.0),
]


def write(folder):
    folder.mkdir(parents=True, exist_ok=True)
    names = ("text", "label", "tokens", "ner_tags", "score")
    rows = [dict(zip(names, (text, label, text.split(), tags, score))) for text, label, tags, score in TEXTS]
    features = Features(
        {
            "text": Value("string"),
            "label": ClassLabel(names=INTENTS),
            "tokens": List(Value("string")),
            "ner_tags": List(ClassLabel(names=TAGS)),
            "score": Value("float32"),
        }
    )
    # -100 is no class to `datasets`: written as the integers that they are, below the same metadata.
    whole = Dataset.from_list(rows, features=features)
    whole.to_parquet(folder / "cards.parquet")
    for i in range(2):
        whole.shard(2, i, contiguous=True).to_parquet(folder / f"part-{i}.parquet", compression="gzip")
