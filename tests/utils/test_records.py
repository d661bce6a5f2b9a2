"""Files of records: what they hold, what is refused and where, and that a file of any size streams."""

import hashlib
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgfast.utils.records import IndexedRecords, Record, RecordError, data_digest, read_records

CHAT = [
    {"role": "system", "content": ""},
    {"role": "user", "content": "hé\u2028llo"},
    {"role": "assistant", "content": "a"},
]


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes, name: str = "data.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_jsonl_of_texts_and_chats(write):
    lines = [
        {"text": " one\n two"},
        {"messages": CHAT, "source": [1, {}]},
        {"text": "x", "id": "k"},
        {"id": 7, "text": "y"},
    ]
    path = write("\ufeff" + "\r\n\n".join(json.dumps(line) for line in lines))
    expected = [
        Record("1", 1, " one\n two", None),
        Record("3", 3, None, CHAT),
        Record("k", 5, "x", None),
        Record("7", 7, "y", None),
    ]
    assert list(read_records(path)) == expected
    indexed = IndexedRecords(path)
    assert list(indexed) == expected
    assert indexed[-1] == expected[-1]
    assert indexed[1:3] == expected[1:3]


def test_text_by_line_and_by_paragraph(write):
    path = write("\n  first line\r\nsecond\n \t\n\nthird\n{not json}", "data.txt")
    assert [(r.line, r.text) for r in read_records(path)] == [
        (2, "  first line"),
        (3, "second"),
        (6, "third"),
        (7, "{not json}"),
    ]
    expected = [(2, "  first line\r\nsecond"), (6, "third\n{not json}")]
    assert [(r.line, r.text) for r in read_records(path, text_unit="paragraph")] == expected
    assert [(r.line, r.text) for r in IndexedRecords(path, text_unit="paragraph")] == expected
    with pytest.raises(ValueError, match="text_unit must be one of line, paragraph; got 'page'"):
        read_records(path, text_unit="page")


@settings(max_examples=60)
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1))
def test_any_text_survives(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("any") / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf-8")
    assert [record.text for record in read_records(path)] == texts
    assert [record.text for record in IndexedRecords(path)] == texts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "not JSON: Unterminated string starting at (column 10)"),
        ("[" * 100_000, "not JSON: "),
        ('{"text": ' + "9" * 5000 + "}", "not JSON: "),
        ('["text"]', 'must be a JSON object with the key "text" or "messages"; got a list'),
        ('{"Text": "x"}', 'must have one of the keys "text" and "messages"; it has neither'),
        ('{"text": "x", "messages": []}', 'must have one of the keys "text" and "messages"; it has both'),
        ('{"text": 3}', '"text" must be a string; got a number'),
        ('{"text": null}', '"text" must be a string; got null'),
        ('{"text": " "}', '"text" is empty'),
        ('{"text": "\\ud800"}', '"text" is not Unicode text (surrogates not allowed)'),
        ('{"text": "x", "id": true}', '"id" must be a string or an integer; got a boolean'),
        ('{"messages": {"role": "user"}}', '"messages" must be a list; got an object'),
        ('{"messages": []}', '"messages" is empty'),
        ('{"messages": ["x"]}', "message 1 must be an object; got a string"),
        ('{"messages": [{"role": "user"}]}', 'message 1 must have the keys "role" and "content" and no other'),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "x", "name": "y"}]}',
            'message 2 must have the keys "role" and "content" and no other',
        ),
        ('{"messages": [{"role": "user", "content": ["x"]}]}', 'message 1: "content" must be a string; got a list'),
        ('{"messages": [{"role": [], "content": "x"}]}', 'message 1: "role" must be one of system, user, assistant'),
        (
            '{"messages": [{"role": "User", "content": "x"}]}',
            "message 1: \"role\" must be one of system, user, assistant. Did you mean 'user'?",
        ),
        (b'{"text": "\xff"}', "not UTF-8 text (invalid start byte)"),
    ],
)
def test_malformed_lines_are_named(write, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    path = write(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    records = read_records(path)
    assert next(records).text == "fine"
    for read in (lambda: next(records), lambda: IndexedRecords(path)):
        with pytest.raises(RecordError) as raised:
            read()
        assert str(raised.value).startswith(f"{path}, line 3: {message}")
        assert "\n" not in str(raised.value)


def test_undecodable_line_inside_a_paragraph(write):
    path = write(b"one\ntwo\n\xc3(\nfour", "data.txt")
    with pytest.raises(RecordError, match=r"data.txt, line 3: not UTF-8 text \(invalid continuation byte\)"):
        list(read_records(path, text_unit="paragraph"))


def test_files_without_records(write, tmp_path):
    for name, content in (("a.jsonl", ""), ("a.txt", ""), ("b.txt", "\n \t\n"), ("b.json", "\ufeff\n")):
        for read in (lambda path: list(read_records(path)), IndexedRecords):
            with pytest.raises(RecordError, match=rf"{name} holds no records"):
                read(write(content, name))
    for read in (lambda path: list(read_records(path)), IndexedRecords, data_digest):
        with pytest.raises(RecordError, match=r"absent cannot be read: No such file"):
            read(tmp_path / "absent")
        with pytest.raises(RecordError, match="is a folder, not a text or JSONL file"):
            read(tmp_path)


def test_a_file_that_changed_is_noticed(write):
    path = write('{"text": "one"}\n{"text": "two"}\n')
    records = IndexedRecords(path)
    path.write_text('{"text": "o"}\n{"text": "two and"}\n')
    with pytest.raises(RecordError, match="line 2: not JSON"):
        records[1]


def test_memory_holds_one_record(write):
    path = write((json.dumps({"text": "x" * 1000}) + "\n") * 20_000)
    tracemalloc.start()
    assert sum(len(record.text) for record in read_records(path)) == 20_000_000
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.reset_peak()
    assert len(IndexedRecords(path)) == 20_000
    assert tracemalloc.get_traced_memory()[1] < 24 * 20_000 * 1.5 + 200_000
    tracemalloc.stop()


def test_digest(write):
    content = b'{"text": "x"}\n' * 100_000
    assert data_digest(write(content)) == hashlib.sha256(content).hexdigest()
