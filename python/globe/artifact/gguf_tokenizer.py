"""A tokenizer in GGUF: tokens, their kinds and merges, and the rule that llama.cpp splits text by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from globe.checkpoint.json_file import read_json
from globe.errors import GlobeError

# Regular expressions of tokenizer.json for which llama.cpp has a rule of its own name; that of GPT-2 is ByteLevel's.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_CONTRACTIONS + _WORDS % "": "qwen2", _CONTRACTIONS + _WORDS % "{1,3}": "llama-bpe"}


def require_tokenizer(directory: Path) -> str:
    """llama.cpp's name of the rule by which the tokenizer of a directory splits text before it merges.

    Raises
    ------
    GlobeError
        If there is no tokenizer.json, or it is not byte-level BPE with merges and a rule that is known.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise GlobeError(f"{directory}: no tokenizer.json, which GGUF's tokenizer is made of; save it there")
    told = read_json(file)
    model, before = told.get("model") or {}, told.get("pre_tokenizer") or {}
    if not model.get("merges"):
        raise GlobeError(f"{file}: {model.get('type')} without merges found; GGUF needs byte-level BPE with them")
    steps = before.get("pretokenizers", []) if before.get("type") == "Sequence" else [before]
    kinds = [step.get("type") for step in steps]
    prefixed = any(step.get("add_prefix_space") for step in steps)
    if model.get("type") == "BPE" and kinds and kinds[-1] == "ByteLevel" and not prefixed:
        by_regex = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and by_regex:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and by_regex and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not by_regex and steps[0].get("behavior") == "Isolated":
            rule = _SPLITS.get(str((steps[0].get("pattern") or {}).get("Regex")))
            if rule is not None:
                return rule
    raise GlobeError(
        f"{file}: {model.get('type')} behind {', '.join(map(str, kinds))} is no rule of llama.cpp that is known here: "
        "leave out --gguf-type, and use llama.cpp's own converter"
    )


def add_tokenizer(writer: Any, directory: Path, rows: int) -> None:
    """Write the tokenizer of a directory to a GGUFWriter, padded to as many tokens as the embedding has rows."""
    import gguf

    rule = require_tokenizer(directory)
    told = read_json(directory / "tokenizer.json")
    tokens = [f"[PAD{number}]" for number in range(rows)]
    kinds = [gguf.TokenType.UNUSED] * rows
    added = {entry["content"]: entry for entry in told.get("added_tokens", [])}
    numbers = told["model"]["vocab"] | {content: entry["id"] for content, entry in added.items()}
    for token, number in numbers.items():
        if not 0 <= number < rows:
            raise GlobeError(f"{directory}: token {token!r} has number {number}, the embedding has {rows} rows")
        special = token in added and added[token].get("special")
        tokens[number] = token
        kinds[number] = gguf.TokenType.CONTROL if special else gguf.TokenType.NORMAL
        if token in added and not special:
            kinds[number] = gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    gguf.SpecialVocab(directory, load_merges=True, n_vocab=rows).add_to_gguf(writer, quiet=True)
