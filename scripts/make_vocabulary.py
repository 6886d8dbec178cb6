"""Write the embedded zoo's vocabulary: the byte-pair ids of every phrase that captions and prompts can hold."""

import json

from open_clip.tokenizer import SimpleTokenizer

from lightning_vlmq.data.embedded.captions import all_phrases
from lightning_vlmq.models import zoo


def vocabulary() -> list[int]:
    """Sorted byte-pair ids, start and end of text included, padding (0) not."""
    return sorted({int(i) for i in SimpleTokenizer()(all_phrases()).unique()} - {0})


if __name__ == "__main__":
    (zoo.FOLDER / "vocabulary.json").write_text(json.dumps(vocabulary()) + "\n")
