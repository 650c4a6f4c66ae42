"""Documents of a text source: a UTF-8 file, records of a .jsonl file, or a folder of such files, in two halves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from globe.errors import GlobeError, UsageError

CALIBRATION, EVALUATION = "calibration", "evaluation"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TEXT_SUFFIXES = frozenset(
    ".txt .md .rst .tex .html .xml .csv .json .jsonl .yaml .yml .toml "
    ".py .sh .c .h .cpp .hpp .rs .go .java .js .ts".split()
)

Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class Document:
    """A text or a conversation, and the name by which it falls into a half."""

    name: str
    content: str | Conversation

    def render(self, tokenizer: Any) -> str:
        """The text; a conversation through the tokenizer's chat template.

        Raises
        ------
        GlobeError
            If the tokenizer has none, or it refuses the conversation.
        """
        if isinstance(self.content, str):
            return self.content
        if not getattr(tokenizer, "chat_template", None):
            raise GlobeError(f"{self.name}: a conversation, and the tokenizer has no chat template; give plain text")
        try:
            return str(tokenizer.apply_chat_template(self.content, tokenize=False))
        except Exception as error:  # templates raise types of their own
            said = str(error).partition("\n")[0] or type(error).__name__
            raise GlobeError(f"{self.name}: the tokenizer's chat template refuses it: {said}") from error


def read_documents(path: Path, note: Callable[[str], None]) -> list[Document]:
    """The documents of a file, or of all text files below a folder in sorted order.

    Parameters
    ----------
    path : Path
        A UTF-8 file; of a .jsonl file every line is a document: an object with `text`, `messages` (role and content)
        or `conversations` (from and value). Or a folder; files in it that are not text are passed over.
    note : callable
        Told of what was passed over in a folder although it is named like text.

    Raises
    ------
    UsageError
        If there is no such file.
    GlobeError
        If it is not UTF-8, a record is of another form, or a folder has no text.
    """
    if not path.is_dir():
        return _documents_of(path, path.name)
    found: list[Document] = []
    for file in sorted(each for each in path.rglob("*") if each.suffix.lower() in _TEXT_SUFFIXES and each.is_file()):
        try:
            found += _documents_of(file, str(file.relative_to(path)))
        except (GlobeError, UsageError) as error:
            note(f"passed over: {error}")
    if not found:
        raise GlobeError(f"{path}: no text in this folder; expected files such as .txt, .md, .py or .jsonl")
    return found


def half_of(documents: Sequence[Document], half: str) -> list[Document]:
    """One half of some documents: by the hash of their names, so that others beside them change nothing.

    Where one half would be empty, the documents are joined and cut in the middle. Documents come in the order of the
    hashes: the first ones are a sample of all.
    """
    parts: dict[str, list[tuple[bytes, Document]]] = {CALIBRATION: [], EVALUATION: []}
    for document in documents:
        digest = hashlib.sha256(document.name.encode(errors="surrogateescape")).digest()
        parts[CALIBRATION if digest[-1] % 2 == 0 else EVALUATION].append((digest, document))
    if all(parts.values()):
        return [document for _, document in sorted(parts[half], key=lambda pair: pair[0])]
    if all(isinstance(document.content, str) for document in documents):
        text = "\n\n".join(str(document.content) for document in documents)
        return [Document(documents[0].name, cut(text, half))]
    middle = (len(documents) + 1) // 2
    return list(documents[:middle] if half == CALIBRATION else documents[middle:])


def cut(text: str, half: str) -> str:
    """The first half of a text for calibration, or the second for evaluation."""
    middle = len(text) // 2
    return text[:middle] if half == CALIBRATION else text[middle:]


def _documents_of(file: Path, name: str) -> list[Document]:
    try:
        content = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise GlobeError(f"{file}: not UTF-8 text (byte {error.start})") from error
    if file.suffix.lower() != ".jsonl":
        return [Document(name, content)]
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines:
        raise GlobeError(f"{file}: no records; expected a JSON object on every line")
    return [Document(f"{name}:{number}", _content(line, f"{file}, line {number}")) for number, line in lines]


def _content(line: str, place: str) -> str | Conversation:
    try:
        record = json.loads(line)
    except ValueError:
        raise GlobeError(f"{place}: not JSON; expected an object with text, messages or conversations") from None
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return str(record["text"])
        for key, who, what in (("messages", "role", "content"), ("conversations", "from", "value")):
            turns = record.get(key)
            if isinstance(turns, list) and turns:
                return [_turn(turn, who, what, place) for turn in turns]
    raise GlobeError(f"{place}: found no text; expected an object with text, messages or conversations")


def _turn(turn: Any, who: str, what: str, place: str) -> dict[str, str]:
    if not (isinstance(turn, dict) and isinstance(turn.get(who), str) and isinstance(turn.get(what), str)):
        raise GlobeError(f"{place}: found a turn without {who} and {what}; expected text in both")
    return {"role": _ROLES.get(turn[who], turn[who]), "content": turn[what]}
