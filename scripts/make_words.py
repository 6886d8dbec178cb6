"""Write the vocabulary of the concepts benchmark's models: every word that captions, names and prompts can hold."""

import json

from lightning_vlmq.data.embedded.wording import all_phrases
from lightning_vlmq.models import zoo

if __name__ == "__main__":
    words = sorted({word for phrase in all_phrases() for word in zoo.split_words(phrase)})
    (zoo.CONCEPTS / "words.json").write_text(json.dumps(words, ensure_ascii=False) + "\n", encoding="utf-8")
