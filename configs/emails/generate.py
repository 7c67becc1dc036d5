"""Write train.jsonl and test.jsonl next to this file: customer e-mails to sort into invoice, order, support or spam.

Usage: python configs/emails/generate.py [FOLDER]

Every e-mail is a template of templates.yaml with its slots filled, with or without subject, greeting and sign-off, and
sometimes in a hurry: lower case, typos. Train and test draw from separate lists of templates, greetings and sign-offs,
so the test asks for the meaning, not for a sentence seen before. The same seed gives the same bytes.
"""

import itertools
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

SEED = 20240601
CLASSES = ("invoice", "order", "support", "spam")
ROWS = {"train": 480, "test": 120}
SYSTEM = "Sort the e-mail: invoice, order, support or spam?"


def generate(split: str, templates: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The chat samples of `train` or `test`, balanced over the classes, in random order, no e-mail twice."""
    pool, seen = templates[split], set()
    for label, copy, template in _plan(split, pool):
        for attempt in itertools.count():
            # A random stream for each e-mail: a changed template changes no other e-mail.
            rng = random.Random(f"{SEED}/{split}/{label}/{copy}/{attempt}/{template}")
            email = _write(template, pool, _slots(templates["slots"], rng), rng)
            if email not in seen:
                break
        seen.add(email)
        yield {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": email},
                {"role": "assistant", "content": label},
            ]
        }


def _plan(split: str, pool: dict[str, Any]) -> list[tuple[str, int, str]]:
    """(label, copy, template) of every row: each template equally often, shuffled."""
    rows = []
    for label in CLASSES:
        for row in range(ROWS[split] // len(CLASSES)):
            copy, index = divmod(row, len(pool[label]))
            rows.append((label, copy, pool[label][index]))
    random.Random(f"{SEED}/{split}").shuffle(rows)
    return rows


def _write(template: str, pool: dict[str, Any], slots: dict[str, str], rng: random.Random) -> str:
    subject, body = (part.strip() for part in template.format(**slots).split(" | "))
    # most e-mails are short on purpose: the quickstart trains on a CPU
    greets_itself = body.startswith(("Dear", "Hello", "Hi ", "Greetings"))
    if rng.random() < 0.4 and not greets_itself:
        body = f"{rng.choice(pool['greetings']).format(**slots)} {body}"
    if rng.random() < 0.4:
        body = f"{body}\n{rng.choice(pool['sign_offs']).format(**slots)}"
    if rng.random() < 0.12:
        subject, body = subject.lower(), body.lower()
    if rng.random() < 0.15:
        body = _typos(body, rng)
    return body if rng.random() < 0.3 else f"Subject: {subject}\n{body}"


def _slots(lists: dict[str, list[str]], rng: random.Random) -> dict[str, str]:
    slots = {name: rng.choice(values) for name, values in lists.items()}
    return {
        **slots,
        "name": f"{slots['first']} {slots['last']}",
        "date": f"{rng.choice(lists['month'])} {rng.randint(1, 28)}",
        "n": str(rng.randint(4, 9)),
        "amount": rng.choice(["{} euros", "${}", "EUR {}", "{} dollars"]).format(rng.randint(11, 999)),
        "order": rng.choice(["#{}", "no. {}", "A-{}"]).format(rng.randint(100, 9999)),
        "invoice": rng.choice(["INV-{}", "no. {}", "R{}"]).format(rng.randint(100, 9999)),
    }


def _typos(text: str, rng: random.Random) -> str:
    """Two neighbouring letters swapped inside two of the longer words."""
    words = list(re.finditer(r"[A-Za-z]{5,}", text))
    for match in rng.sample(words, min(2, len(words))):
        at = rng.randrange(match.start() + 1, match.end() - 2)
        text = f"{text[:at]}{text[at + 1]}{text[at]}{text[at + 2 :]}"
    return text


def main(folder: Path) -> None:
    templates = yaml.safe_load((Path(__file__).parent / "templates.yaml").read_text(encoding="utf-8"))
    for split in ROWS:
        lines = [json.dumps(sample, ensure_ascii=False) for sample in generate(split, templates)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
