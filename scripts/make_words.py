"""Write the vocabulary of the embedded models: every word that captions, names and prompts can hold."""

import json

from lightning_vlmq.data.embedded.wording import all_phrases
from lightning_vlmq.models import zoo


def vocabulary() -> list[str]:
    """Those words, sorted."""
    return sorted({word for phrase in all_phrases() for word in zoo.split_words(phrase)})


if __name__ == "__main__":
    (zoo.FOLDER / "words.json").write_text(json.dumps(vocabulary(), ensure_ascii=False) + "\n", encoding="utf-8")
