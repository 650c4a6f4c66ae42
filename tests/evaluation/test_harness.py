"""`globe eval --lm-eval`, with a task made of a local file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from checkpoints import make_tiny  # noqa: E402
from globe import Settings, compress  # noqa: E402
from globe.errors import UsageError  # noqa: E402
from globe.evaluation.harness import evaluate_tasks  # noqa: E402
from globe.evaluation.models import load_model  # noqa: E402
from refusals import in_process, refusal  # noqa: E402

QUESTIONS = [
    {"question": f"{a} plus {b} is", "choices": [f" {a + b}", f" {a + b + 1}", f" {a * b + 7}"], "answer": 0}
    for a, b in [(1, 2), (2, 2), (3, 5), (4, 4), (5, 1), (6, 2)]
]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("harness")
    source = make_tiny("olmoe", home / "source", dtype="float32")
    settings = Settings(rank=0.5, bank_size=3, outer_loops=0, device="cpu", calibrate="none")
    compress(source, home / "out", settings)
    return home / "out"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS), encoding="utf-8")
    task = f"""
task: globe_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / "cache"}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "globe_sums.yaml").write_text(task, encoding="utf-8")
    return tmp_path / "tasks"


def accuracy(directory: Path, questions: list[dict[str, object]]) -> float:
    """Of the choice with the highest log likelihood, computed directly."""
    model, tokenizer = load_model(directory)
    right = 0
    for question in questions:
        scores = []
        for choice in question["choices"]:  # type: ignore[attr-defined]
            context, ids = (tokenizer(part)["input_ids"] for part in (question["question"], choice))
            with torch.no_grad():
                logits = model(torch.tensor([context + ids])).logits[0].double().log_softmax(1)
            scores.append(sum(float(logits[len(context) - 1 + k, token]) for k, token in enumerate(ids)))
        right += scores.index(max(scores)) == question["answer"]
    return right / len(questions)


def test_a_factored_directory_on_a_local_task(out: Path, folder: Path) -> None:
    expected = accuracy(out, QUESTIONS)  # type: ignore[arg-type]
    done = in_process("eval", out, "--lm-eval", "globe_sums", "--lm-eval-path", folder, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["globe_sums"]["acc"] == pytest.approx(expected)
    part = evaluate_tasks(out, ["globe_sums"], task_path=folder, limit=3)
    assert part["globe_sums"]["acc"] == pytest.approx(accuracy(out, QUESTIONS[:3]))  # type: ignore[arg-type]


@pytest.mark.slow  # reads all of lm-eval's tasks
@pytest.mark.parametrize("program", [("lm-eval", "run"), ("lm_eval",)], ids=["new", "old"])
def test_lm_evals_own_command(program: tuple[str, ...], out: Path, folder: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(out, tmp_path / "out")  # with an end of text, which lm-eval asks for
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(whole)
    command = [str(Path(sys.executable).with_name(program[0])), *program[1:], "--model", "hf", "--tasks", "globe_sums"]
    command += ["--model_args", f"pretrained={whole},trust_remote_code=True", "--include_path", str(folder)]
    command += ["--device", "cpu", "--output_path", str(tmp_path / "results")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "results").rglob("*.json")
    found = json.loads(file.read_text(encoding="utf-8"))["results"]["globe_sums"]
    assert found["acc,none"] == pytest.approx(accuracy(out, QUESTIONS))  # type: ignore[arg-type]


@pytest.mark.slow  # reads all of lm-eval's tasks
def test_an_unknown_task(out: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match="globe_no_such_task"):
        evaluate_tasks(out, ["globe_no_such_task"], task_path=folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--limit", "3"), "go with --lm-eval"),
        (("--lm-eval", "globe_sums", "--max-tokens", "9"), "do not go with --lm-eval"),
    ],
)
def test_options_that_do_not_belong_together(options: tuple[str, ...], message: str, out: Path) -> None:
    assert message in refusal(2, "eval", out, *options)


def test_lm_eval_absent(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert 'pip install "globe-moe[eval]"' in refusal(1, "eval", out, "--lm-eval", "globe_sums")
