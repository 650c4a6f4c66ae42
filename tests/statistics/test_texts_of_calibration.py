"""What is calibrated on: documents in halves, weights, windows for variety, and what the file tells of it all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from click.testing import CliRunner  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from checkpoints import byte_tokenizer, calibrate_tiny  # noqa: E402
from displays import Lines  # noqa: E402
from globe.cli import cli  # noqa: E402
from globe.errors import GlobeError, UsageError  # noqa: E402
from globe.settings import Settings  # noqa: E402
from globe.statistics.calibration import load_calibration  # noqa: E402
from globe.statistics.diversity import most_diverse  # noqa: E402
from globe.statistics.documents import Document, half_of, read_documents  # noqa: E402
from globe.statistics.held_out import HeldOut, held_out_texts, read_held_out  # noqa: E402
from globe.statistics.mixture import deal, mixture, parse_texts, tokens_for, usual_tokens  # noqa: E402
from globe.statistics.python_texts import PARTS, python_documents  # noqa: E402
from globe.statistics.texts import evaluation_text  # noqa: E402

HALVES = ("calibration", "evaluation")


def contents(documents: list[Document]) -> list[Any]:
    return [document.content for document in documents]


def unheard(line: str) -> None:
    raise AssertionError(line)


def test_halves_share_no_document_and_lose_none() -> None:
    documents = [Document(f"file{number}", f"text {number}") for number in range(20)]
    halves = [contents(half_of(documents, half)) for half in HALVES]
    assert sorted(halves[0] + halves[1]) == sorted(contents(documents)) and min(map(len, halves)) >= 5
    more = [*documents, Document("another", "new")]
    assert [set(contents(half_of(more, half))) - {"new"} for half in HALVES] == [set(half) for half in halves]


def test_one_document_is_cut_in_the_middle() -> None:
    assert [contents(half_of([Document("a", "abcdef")], half)) for half in HALVES] == [["abc"], ["def"]]
    talks = [Document(name, [{"role": "user", "content": name}]) for name in ("a", "b", "c")]
    one = next(document for document in talks)
    assert contents(half_of([one], "calibration")) == [one.content] and half_of([one], "evaluation") == []


@pytest.mark.parametrize("part", PARTS)
def test_what_python_carries(part: str) -> None:
    halves = [python_documents(part, half) for half in HALVES]
    assert all(halves)
    if part == "sources":
        names = [{document.name for document in half} for half in halves]
        assert not names[0] & names[1] and len(names[0]) > 100 and len(names[1]) > 100
        assert not any(name.startswith(("test/", "pydoc_data/", "site-packages/")) for name in names[0] | names[1])


def test_files_of_all_kinds(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("plain", encoding="utf-8")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.md").write_text("marked", encoding="utf-8")
    (tmp_path / "c.bin").write_bytes(b"\0")
    (tmp_path / "d.py").write_bytes(b"\xff\xfe")
    records = [
        {"text": "one"},
        {"messages": [{"role": "user", "content": "hello"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
    ]
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    notes: list[str] = []
    found = read_documents(tmp_path, notes.append)
    assert [document.name for document in found] == ["b.txt", "e.jsonl:1", "e.jsonl:2", "e.jsonl:3", "sub/a.md"]
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert contents(found) == ["plain", "one", records[1]["messages"], talk, "marked"]
    assert len(notes) == 1 and "d.py: not UTF-8 text (byte 0)" in notes[0]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "file.jsonl, line 2: not JSON"),
        ("[1]", "line 2: found no text; expected an object with text, messages or conversations"),
        ('{"messages": []}', "line 2: found no text"),
        ('{"messages": [{"role": "user"}]}', "line 2: found a turn without role and content"),
    ],
)
def test_records_of_another_form(line: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "file.jsonl"
    file.write_text('{"text": "x"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(GlobeError, match=told):
        read_documents(file, unheard)


def test_places_without_text(tmp_path: Path) -> None:
    with pytest.raises(GlobeError, match="no text in this folder"):
        read_documents(tmp_path, unheard)
    with pytest.raises(UsageError, match="nowhere: No such file"):
        read_documents(tmp_path / "nowhere", unheard)


def test_conversations_go_through_the_chat_template() -> None:
    tokenizer, talk = byte_tokenizer(), Document("talk", [{"role": "user", "content": "hello"}])
    with pytest.raises(GlobeError, match="talk: a conversation, and the tokenizer has no chat template"):
        talk.render(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert talk.render(tokenizer) == "<user>hello"
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(GlobeError, match="talk: the tokenizer's chat template refuses it: roles must alternate"):
        talk.render(tokenizer)


def test_shares_of_texts() -> None:
    assert [(text.name, text.group) for text in mixture({"auto": 1})] == [
        *((f"pydoc:{part}", "pydoc") for part in PARTS),
        ("self", "self"),
    ]
    assert [text.share for text in mixture({"auto": 1})] == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    assert [text.share for text in mixture({"self": 1, "a.txt": 3})] == [0.25, 0.75]
    for given, told in (({"a": 0.0}, "text a: weight is 0; expected a number above 0"), ({}, "no text is named")):
        with pytest.raises(UsageError, match=told):
            mixture(given)


def test_words_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_texts(["pydoc", "self=2", "a=b", "notes.txt=0.5"]) == {
        "pydoc": 1,
        "self": 2,
        "a=b": 1,
        "notes.txt": 0.5,
    }
    monkeypatch.chdir(tmp_path)
    Path("x=3").write_text("text", encoding="utf-8")
    assert parse_texts(["x=3", "y=3"]) == {"x=3": 1, "y": 3}
    with pytest.raises(UsageError, match="text a is given twice"):
        parse_texts(["a", "a=2"])


@pytest.mark.parametrize("there", [[100, 100, 100], [100, 2, 100], [0, 1, 2], [5, 0, 0]])
def test_what_a_text_lacks_the_others_make_up_for(there: list[int]) -> None:
    found = deal(12, [1, 1, 2], there)
    assert sum(found) == min(12, sum(there)) and all(map(int.__le__, found, there))
    assert there != [100, 100, 100] or found == [3, 3, 6]


def test_usual_tokens() -> None:
    assert list(map(usual_tokens, (64, 512, 576, 2048, 7168))) == [32768, 32768, 36864, 131072, 131072]
    assert tokens_for(Settings(), 576) == 36864 and tokens_for(Settings(calibration_tokens=100), 576) == 100


def greedy(windows: Any, count: int) -> list[int]:
    """The definition, all gains counted anew for every choice."""
    left, covered, chosen = list(range(len(windows))), set[int](), []
    while len(chosen) < count:
        gains = [len(set(windows[place].tolist()) - covered) for place in left]
        if max(gains) == 0:
            covered = set()
            continue
        place = left.pop(gains.index(max(gains)))
        covered |= set(windows[place].tolist())
        chosen.append(place)
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(5))
def test_windows_cover_the_vocabulary(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    windows = (torch.rand(40, 16, generator=random) ** 3 * 60).long()
    for count in (1, 5, 20, 39):
        assert most_diverse(windows, count).tolist() == greedy(windows, count)
    assert most_diverse(windows, 50).tolist() == list(range(40))
    assert most_diverse(windows[:0], 3).tolist() == []


def test_the_file_tells_of_every_text(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("A router sends every token to a few experts. " * 20, encoding="utf-8")
    found = calibrate_tiny(tiny("mixtral"), tmp_path / "one", text={"pydoc": 2, "self": 1, str(notes): 1}, tokens=1280)
    again = calibrate_tiny(tiny("mixtral"), tmp_path / "two", text={"pydoc": 2, "self": 1, str(notes): 1}, tokens=1280)
    assert found.path.read_bytes() == again.path.read_bytes()
    texts = {text["name"]: text for text in found.about["texts"]}
    assert list(texts) == [*(f"pydoc:{part}" for part in PARTS), "self", str(notes)]
    assert [text["tokens"] for text in texts.values()] == [256, 192, 192, 320, 320]
    assert sum(text["share"] for text in texts.values()) == pytest.approx(1, abs=1e-5)
    assert all(len(text["sha256"]) == 64 for text in texts.values())
    assert found.about["tokens"] == 1280 and found.about["text"] == f"pydoc, self and {notes}"
    own = texts["self"]
    assert (own["samples"], own["held_out"], own["length"], own["seed"], own["temperature"]) == (5, 2, 64, 0, 1.0)
    samples, held_out = found.tokens("samples"), found.tokens("held_out_samples")
    assert samples is not None and samples.shape == (5, 64) and held_out is not None and held_out.shape == (2, 64)
    assert not any(torch.equal(one, other) for one in samples for other in held_out)


def test_samples_alone_are_measured(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    found = calibrate_tiny(tiny("olmoe"), tmp_path / "own", text={"self": 1}, tokens=512, window=128)
    layer = found.layer(1)
    assert int(layer.counts.sum()) == 2 * 512 and found.about["text"] == "self"
    ids = found.tokens("samples")
    assert ids is not None
    text = byte_tokenizer().decode(ids.flatten())
    if byte_tokenizer()(text)["input_ids"] == ids.flatten().tolist():  # what is not UTF-8 does not come back
        given = calibrate_tiny(tiny("olmoe"), tmp_path / "text", text=text, tokens=512, window=128)
        torch.testing.assert_close(given.layer(1).moment, layer.moment)


def test_a_file_of_before_is_read(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    found = calibrate_tiny(tiny("mixtral"), tmp_path / "file")
    about = {key: value for key, value in found.about.items() if key != "texts"}
    metadata = {"format": "globe-calibration-2", "layers": "[0, 1]", "about": json.dumps(about)}
    save_file(load_file(found.path), tmp_path / "before", metadata)
    old = load_calibration(tmp_path / "before")
    assert old.tokens("samples") is None and torch.equal(old.layer(0).moment, found.layer(0).moment)


def test_command_with_weights(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("A router sends every token to a few experts. " * 100, encoding="utf-8")
    options = ["--text", f"{notes}=3", "--text", "pydoc:topics", "--tokens", "1024", "--window", "128"]
    said = CliRunner().invoke(cli, ["calibrate", str(tiny("olmoe")), str(tmp_path / "file"), *options])
    assert said.exit_code == 0, said.output
    assert f"{notes}: 768 tokens, 75.0%" in said.output and "pydoc:topics: 256 tokens, 25.0%" in said.output
    said = CliRunner().invoke(cli, ["calibrate", str(tiny("olmoe")), str(tmp_path / "file"), "--text", "pydoc=0"])
    assert isinstance(said.exception, UsageError) and "weight is 0" in str(said.exception)


def test_default_without_samples(tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("globe.statistics.calibrate.memory_limit", lambda _: 1 << 20)
    lines = Lines()
    found = calibrate_tiny(tiny("mixtral"), tmp_path / "file", text=None, progress=lines)
    assert found.about["text"] == "pydoc" and found.about["tokens"] == 640
    assert "no samples of the model itself, pydoc alone" in lines.lines[0] and "--max-memory" in lines.lines[0]
    with pytest.raises(GlobeError, match="own samples need a layer in memory"):
        calibrate_tiny(tiny("mixtral"), tmp_path / "file", text={"self": 1})


def test_what_is_held_out(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("stays.txt", "goes.txt")]
    for file in files:
        file.write_text("ab" * 500 + "cd" * 500, encoding="utf-8")
    given: dict[str, float] = {"pydoc": 1, "self": 1, **{str(file): 1 for file in files}}
    made = calibrate_tiny(tiny("mixtral"), tmp_path / "file", text=given, tokens=1280)
    files[1].unlink()
    notes: list[str] = []
    file = tmp_path / "held-out.json"
    assert read_held_out(file) is None
    file.write_text(HeldOut.of(made).text(), encoding="utf-8")
    recorded = read_held_out(file)
    assert recorded is not None
    found = held_out_texts(recorded, byte_tokenizer(), notes.append)
    assert list(found) == [*(f"pydoc:{part}" for part in PARTS), "self", str(files[0])]
    assert found[str(files[0])] == "cd" * 500 and found["pydoc:topics"] == evaluation_text("evaluation")
    assert torch.equal(found["self"], made.tokens("held_out_samples"))
    assert len(notes) == 1 and "not judged on the held-out half of" in notes[0] and "goes.txt" in notes[0]


@pytest.mark.parametrize(
    "content", ['{"texts": ["self"]}', '{"texts": [1], "samples": null}', '{"texts": [], "samples": [[1], [1, 2]]}']
)
def test_damaged_record_of_what_is_held_out(content: str, tmp_path: Path) -> None:
    file = tmp_path / "held-out.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(GlobeError, match="held-out.json: damaged; expected texts"):
        read_held_out(file)
