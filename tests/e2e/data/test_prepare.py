"""`ft-dist prepare`: what it prints, where it writes, and that a run finds it."""

import json

from tests.conftest import read_lines

CHATS = [
    {"messages": [{"role": "user", "content": f"What is {n} plus {n}?"}, {"role": "assistant", "content": f"{2 * n}."}]}
    for n in range(120)
]


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(tmp_path, rows=CHATS) -> list[str]:
    train = write(tmp_path / "train.jsonl", rows)
    return ["smoke", f"data.train=[{train}]", "data.eval=[]", f"data.cache_dir={tmp_path / 'cache'}"]


def test_prepared_somewhere_is_trained_on_from_there(cli, tmp_path):
    place = tmp_path / "sets"
    done = cli("prepare", *settings(tmp_path), "--to", str(place), "--json", "--strict", "--workers", "2")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["train"]["samples"] == 120
    assert report["warnings"] == []
    assert f"written at {place}/train-0" in done.stderr
    again = cli("prepare", *settings(tmp_path), "--to", str(place))
    assert f"found at {place}/train-0" in again.stdout
    run = tmp_path / "run"
    overrides = ["data.eval=[]", "optim.max_steps=2", "evaluate.before=false", f"output_dir={run}"]
    trained = cli("train", "smoke", f"data.train=[{place}/train-0]", f"data.cache_dir={tmp_path / 'no'}", *overrides)
    assert trained.returncode == 0, trained.stderr
    assert len(read_lines(run / "metrics.jsonl")) == 2
    saved = json.loads((run / "report.json").read_text())
    assert saved["train"]["sources"][0]["counts"] == report["train"]["sources"][0]["counts"]


def test_strict_fails_on_a_warning_after_printing_the_report(cli, tmp_path):
    done = cli("prepare", *settings(tmp_path, [*CHATS, CHATS[4]]))
    assert done.returncode == 0
    warning = f"train {tmp_path / 'train.jsonl'}: 1 duplicate record (records 5 and 121)"
    assert f"warning: {warning}" in done.stdout
    assert "  | [[0.<|im_end|>]]" in done.stdout
    strict = cli("prepare", *settings(tmp_path, [*CHATS, CHATS[4]]), "--strict")
    assert strict.returncode == 2
    assert (
        strict.stderr.strip() == f"ft-dist: error: --strict does not accept: {warning}. Fix the data, or omit --strict."
    )


def test_an_error_after_the_first_checks_is_one_line(cli, tmp_path):
    # a table is not inspected before it is prepared, so a worker process raises this
    import datasets

    rows = [{"messages": chat["messages"]} for chat in CHATS * 10]
    rows[1100] = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]}
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    done = cli("prepare", *settings(tmp_path), f"data.train=[{path}]", "--workers", "2")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"ft-dist: error: {path} row 1101: messages[1] (assistant): content is empty.")
