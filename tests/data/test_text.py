"""Text files that people write: encodings, line ends, numbers, tables."""

import pytest
from cases.files import refused

from lightning_vlmq.data.text import decode_text, read_lines, read_table, read_text, whole_number


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_lines_are_the_same_however_they_were_written(tmp_path, end, encoding):
    (tmp_path / "x.txt").write_bytes(f"  café{end}{end}x\u2028y{end}".encode(encoding))
    assert list(read_lines(tmp_path / "x.txt")) == [(1, "café"), (3, "x\u2028y")]


def test_marks_of_joined_files_go_too():
    part = "a\nb\n".encode("utf-8-sig")
    assert decode_text(part + part, "x") == "a\nb\na\nb\n"
    assert decode_text("a\ufeffb".encode(), "x") == "a\ufeffb"  # inside a line it is a character


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-32", "cp1252"])
def test_other_encodings_are_named_with_file_and_line(tmp_path, encoding):
    (tmp_path / "x.txt").write_bytes("one\ncafé\n".encode(encoding))
    line = 1 if encoding in ("utf-16", "utf-32") else 2
    refused(lambda: read_text(tmp_path / "x.txt"), f"line {line} of", tmp_path / "x.txt", "UTF-8")


def test_a_file_that_cannot_be_read(tmp_path):
    refused(lambda: read_text(tmp_path), tmp_path, "directory")


@pytest.mark.parametrize("word", ["", "1.0", "01", "+1", "--1", "1e3", "٣", "²", "9" * 19, "nan", "1 ", "-"])
def test_what_is_no_whole_number(word):
    assert whole_number(word) is None


def test_whole_numbers():
    assert [whole_number(word) for word in ("0", "-1", "10", "-0")] == [0, -1, 10, 0]


class TestTable:
    def read(self, tmp_path, content, separator=","):
        (tmp_path / "t.csv").write_text(content)
        return read_table(tmp_path / "t.csv", ["image", "caption"], separator)

    def test_columns_with_the_lines_they_stand_on(self, tmp_path):
        table = self.read(tmp_path, 'caption,x,image\n"a, ""b""",1,i.png\n\n"two\nlines",2,j.png\nNA,3,null\n')
        assert table.columns == {"image": ["i.png", "j.png", "null"], "caption": ['a, "b"', "two\nlines", "NA"]}
        assert table.lines == [2, 5, 6] and len(table) == 3

    def test_unquoted_separators_and_quotes_are_refused(self, tmp_path):
        refused(
            lambda: self.read(tmp_path, "image,caption\ni.png,a\nj.png,a cat, sitting\n"), "line 3", "t.csv", "quotes"
        )
        refused(lambda: self.read(tmp_path, "image\tcaption\ni.png\n", "\t"), "line 2", "1 fields")
        refused(lambda: self.read(tmp_path, 'image,caption\ni.png,"a\nj.png,b\n'), "t.csv", "no CSV")
        refused(lambda: self.read(tmp_path, 'image,caption\ni.png,"a"b\n'), "line 2", "no CSV")

    def test_columns_missing_or_twice(self, tmp_path):
        refused(lambda: self.read(tmp_path, "image,text\n"), "no columns caption", "image, text")
        refused(lambda: self.read(tmp_path, "image,caption,caption\n"), "2 columns caption")
        refused(lambda: self.read(tmp_path, ""), "no columns image")
