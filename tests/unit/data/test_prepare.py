"""Preparing: one result whatever the workers, kills and restarts; nothing half-published, every refusal a sentence."""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bd3_megatron import files
from bd3_megatron.data import work_folder
from bd3_megatron.data.part_pool import Progress, ProgressBar, make_parts
from bd3_megatron.data.prepare import PrepareRequest, prepare
from bd3_megatron.data.shard_header import HEADER_FILE
from bd3_megatron.data.shards import ShardFolder
from bd3_megatron.data.text_files import TextFiles
from bd3_megatron.data.tokenizer_open import load_tokenizer
from bd3_megatron.errors import (
    BD3Error,
    ConfigError,
    DataError,
    FolderHeldError,
    LaunchError,
    TokenizerError,
    WorkStopped,
)
from bd3_megatron.lease import LEASE_FILE, Lease, held
from tests.unit.data.corpora import content_of, english


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(english(6000, 1) + "\n\n" + "emoji \U0001f600 \u4f60\u597d\n\n" + english(500, 2))
    return path


def request(text: Path, out: Path, **changes: object) -> PrepareRequest:
    source = TextFiles(paths=(str(text),), part_bytes=3000)
    return PrepareRequest(out=out, **{"sources": {"train": source}, "valid_fraction": 0.2, **changes})  # type: ignore[arg-type]


def decoded(split: Path) -> list[str]:
    """Documents of a split as text."""
    shards, tokenizer = ShardFolder(split), load_tokenizer(split.parent / "tokenizer")
    texts = []
    for number in range(shards.num_shards):
        ends = shards.document_ends(number).astype(np.int64)
        texts += [tokenizer.decode(t) for t in np.split(shards.tokens(number), ends[:-1])]
    return texts


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
def test_the_text_is_all_there_once_and_the_folder_is_complete(text: Path, tmp_path: Path, tokenizer: str) -> None:
    made = prepare(request(text, tmp_path / "out", tokenizer=tokenizer, vocab_size=400))
    train, valid = decoded(tmp_path / "out" / "train"), decoded(tmp_path / "out" / "valid")
    paragraphs = [p for p in re.sub(r"(\n\n+)", "\\1\0", text.read_text()).split("\0") if p.strip()]
    assert sorted(train + valid) == sorted(paragraphs)
    assert 0.1 < len(valid) / len(paragraphs) < 0.3
    assert made.num_documents == {"train": len(train), "valid": len(valid)} and not made.was_there
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["prepare.json", "tokenizer", "train", "valid"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "text.txt"]
    for split in ("train", "valid"):
        assert len(list(ShardFolder(tmp_path / "out" / split).verify())) > 3


def test_a_heartbeat_during_the_last_deletion_leaves_no_folder(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk: the lease's file is gone, the folder is not yet, and the heartbeat is due."""
    leases: list[Lease] = []
    unlink = os.unlink

    @contextmanager
    def watched(folder: Path, *, name: str) -> Iterator[None]:
        with held(folder, name=name) as lease:
            leases.append(lease)
            yield

    def slow(path: str, *, dir_fd: int | None = None) -> None:
        unlink(path, dir_fd=dir_fd)
        if Path(path).name == LEASE_FILE:
            with suppress(OSError):
                leases[0].beat()

    monkeypatch.setattr(work_folder, "held", watched)
    monkeypatch.setattr(os, "unlink", slow)
    prepare(request(text, tmp_path / "out", tokenizer="bytes"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "text.txt"]


def test_the_result_does_not_depend_on_the_number_of_workers(text: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        prepare(
            request(text, tmp_path / str(workers), tokenizer="sentencepiece-bpe", vocab_size=380, dedup=True),
            num_workers=workers,
        )
    assert content_of(tmp_path / "1") == content_of(tmp_path / "3")


def test_a_second_run_finds_the_folder_and_another_request_is_refused(text: Path, tmp_path: Path) -> None:
    first = prepare(request(text, tmp_path / "out"))
    (tmp_path / ".out.partial" / "work").mkdir(parents=True)  # as after a kill between publishing and tidying
    before = content_of(tmp_path / "out")
    again = prepare(request(text, tmp_path / "out"))
    assert again.was_there and again.num_tokens == first.num_tokens and content_of(tmp_path / "out") == before
    assert not (tmp_path / ".out.partial").exists()
    with pytest.raises(ConfigError, match="was prepared from other text or settings; name a new folder or remove it"):
        prepare(request(text, tmp_path / "out", valid_fraction=0.1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="mine holds other files; name a new or empty folder"):
        prepare(request(text, tmp_path / "mine"))
    (tmp_path / "empty").mkdir()
    assert prepare(request(text, tmp_path / "empty")).num_tokens == first.num_tokens


COMMAND = """
import sys
from pathlib import Path
from bd3_megatron.data.prepare import PrepareRequest, prepare
from bd3_megatron.data.text_files import TextFiles
if __name__ == "__main__":
    source = TextFiles(paths=(sys.argv[1],), part_bytes=3000)
    request = PrepareRequest(out=Path(sys.argv[2]), sources={"train": source}, valid_fraction=0.2)
    prepare(request, num_workers=int(sys.argv[3]), say=print)
"""


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(
    text: Path, tmp_path: Path, root: Path, clean_environment: Mapping[str, str]
) -> None:
    (tmp_path / "runner.py").write_text(COMMAND)
    environment = {**clean_environment, "PYTHONPATH": str(root)}
    command = [sys.executable, str(tmp_path / "runner.py"), str(text)]
    records = tmp_path / ".out.partial" / "work" / "parts"
    # The first kill comes before any part is finished, the others after the next one is.
    for wanted in (0, 1, 4):
        process = subprocess.Popen([*command, str(tmp_path / "out"), "2"], env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and (not records.is_dir() or len(list(records.glob("*/record.json"))) < wanted):
            select.select([], [], [], 0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    if not (tmp_path / "out").exists():
        done = subprocess.run([*command, str(tmp_path / "out"), "2"], env=environment, check=True, capture_output=True)
        assert b"going on with" in done.stdout
    prepare(request(text, tmp_path / "calm"))
    assert content_of(tmp_path / "out") == content_of(tmp_path / "calm")


def limited(text: Path, out: Path, file_bytes: int, sentence: str, num_workers: int = 1) -> None:
    """Prepare where no file may grow past `file_bytes`, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    try:
        with pytest.raises(WorkStopped, match=sentence):
            prepare(request(text, out), num_workers=num_workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fills_up_publishes_nothing_and_keeps_what_is_finished(
    text: Path, tmp_path: Path, workers: int
) -> None:
    big = tmp_path / "big.txt"
    big.write_text(text.read_text() + "word " * 4000)  # the last part alone does not fit
    limited(
        big, tmp_path / "out", 6000, r"failed \(File too large\); free some space .* finished parts are kept", workers
    )
    assert not (tmp_path / "out").exists()
    records = list((tmp_path / ".out.partial" / "work" / "parts").glob("*/record.json"))
    assert len(records) > 3
    prepare(request(big, tmp_path / "out"))
    prepare(request(big, tmp_path / "calm"))
    assert content_of(tmp_path / "out") == content_of(tmp_path / "calm")


def four_files(folder: Path, *, bad: bytes = b"") -> PrepareRequest:
    """A request for four text files, the last of which ends in some bytes."""
    folder.mkdir(exist_ok=True)
    for number in range(4):
        end = bad if number == 3 else b""
        (folder / f"f{number}.txt").write_bytes(english(600, number).encode() + end)
    source = TextFiles(paths=(str(folder),), documents_are="line")
    return PrepareRequest(out=folder.parent / "out", sources={"train": source}, valid_fraction=0.2)


def made_parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that are tokenised from here on, by what they read."""
    from bd3_megatron.data import part_maker

    made: list[str] = []
    make = part_maker.TokenPartMaker.make

    def counted(self, task, report):  # type: ignore[no-untyped-def]
        made.append(Path(task.part.items[0]).name)
        return make(self, task, report)

    monkeypatch.setattr(part_maker.TokenPartMaker, "make", counted)
    return made


def reread_parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The finished parts whose text is compared from here on."""
    from bd3_megatron.data import part_maker

    reread: list[str] = []
    content_of_part = part_maker.content_of

    def counted(source, part):  # type: ignore[no-untyped-def]
        reread.append(Path(part.items[0]).name)
        return content_of_part(source, part)

    monkeypatch.setattr(part_maker, "content_of", counted)
    return reread


def test_finished_parts_are_kept_and_the_same_command_goes_on_once_the_text_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = four_files(tmp_path / "text", bad=b"caf\xe9\n")
    said: list[str] = []
    with pytest.raises(DataError, match=r"f3.txt at byte \d+ is not UTF-8; convert the file .* --skip-bad N"):
        prepare(wanted, say=said.append)
    partial = tmp_path / ".out.partial"
    assert said == [f"3 finished parts are kept in {partial}: the same command goes on from there"]
    path = tmp_path / "text" / "f3.txt"
    path.write_bytes(path.read_bytes().replace(b"\xe9", "\u00e9".encode()))
    os.utime(tmp_path / "text" / "f0.txt")  # touched, not changed: it is read again and not tokenised again
    made, reread = made_parts(monkeypatch), reread_parts(monkeypatch)
    prepare(wanted, say=said.append)
    assert (
        made == ["f3.txt"] and reread == ["f0.txt"] and said[1:] == [f"going on with {partial}: 3 parts are finished"]
    )
    prepare(replace(wanted, out=tmp_path / "calm"))
    assert content_of(tmp_path / "out") == content_of(tmp_path / "calm") and not partial.exists()


def test_a_text_that_changed_is_tokenised_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = four_files(tmp_path / "text", bad=b"caf\xe9\n")
    with pytest.raises(DataError):
        prepare(wanted)
    four_files(tmp_path / "text")
    (tmp_path / "text" / "f1.txt").write_text(english(900, 9))
    (tmp_path / "text" / "a_new_one.txt").write_text(english(200, 8))  # parts are numbered anew
    made = made_parts(monkeypatch)
    prepare(wanted)
    assert sorted(made) == ["a_new_one.txt", "f1.txt", "f3.txt"]
    prepare(replace(wanted, out=tmp_path / "calm"))
    assert content_of(tmp_path / "out") == content_of(tmp_path / "calm")


def test_a_finished_part_is_made_again_where_other_text_made_copies_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = replace(four_files(tmp_path / "text", bad=b"caf\xe9\n"), dedup=True)
    with pytest.raises(DataError):
        prepare(wanted)
    four_files(tmp_path / "text")
    (tmp_path / "text" / "f0.txt").write_text((tmp_path / "text" / "f1.txt").read_text() + "and more\n")
    made = made_parts(monkeypatch)
    assert prepare(wanted).left_out["repeated"] > 5
    assert made == ["f0.txt", "f1.txt", "f3.txt"]
    texts = decoded(wanted.out / "train") + decoded(wanted.out / "valid")
    assert len(set(texts)) == len(texts)
    prepare(replace(wanted, out=tmp_path / "calm"))
    assert content_of(tmp_path / "out") == content_of(tmp_path / "calm")


def test_a_run_killed_while_it_publishes_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bd3_megatron.data import work_folder

    wanted = four_files(tmp_path / "text")
    prepare(replace(wanted, out=tmp_path / "calm"))
    for moves in range(0, 20, 3):
        left = [moves]

        def move(path: Path, target: Path, left: list[int] = left) -> None:
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            files.move(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(work_folder, "move", move)
            try:
                prepare(wanted)
            except KeyboardInterrupt:
                assert not wanted.out.exists()
    order = tmp_path / ".out.partial" / "work" / "order.json"
    whole_order = order.read_text()
    for damaged in ("[", "[]", "[1, 2, 3, 4]"):
        order.write_text(damaged)
        with pytest.raises(
            DataError, match=r"order.json (is damaged|names no part of) .*; remove .*partial and prepare"
        ):
            prepare(wanted)
    order.write_text(whole_order)
    made = made_parts(monkeypatch)
    prepare(wanted)
    assert made == [] and content_of(tmp_path / "out") == content_of(tmp_path / "calm")


LEAVES_ITS_TEMPORARIES = """
import os, sys
from pathlib import Path
from bd3_megatron import files
from bd3_megatron.data.prepare import PrepareRequest, prepare
from bd3_megatron.data.text_files import TextFiles
move = files.move
def killed_at_a_rename(path, target):
    if str(target).endswith(sys.argv[3]):
        os.kill(os.getpid(), 9)
    move(path, target)
files.move = killed_at_a_rename
source = TextFiles(paths=(sys.argv[1],), documents_are="line")
prepare(PrepareRequest(out=Path(sys.argv[2]), sources={"train": source}, valid_fraction=0.2))
"""


@pytest.mark.parametrize("name", ["data/tokenizer", f"data/train/{HEADER_FILE}", "data/prepare.json"])
def test_temporaries_of_a_killed_run_are_not_published(
    tmp_path: Path, root: Path, clean_environment: Mapping[str, str], name: str
) -> None:
    wanted = four_files(tmp_path / "text")
    command = [sys.executable, "-c", LEAVES_ITS_TEMPORARIES, str(tmp_path / "text"), str(wanted.out), name]
    killed = subprocess.run(command, env={**clean_environment, "PYTHONPATH": str(root)}, check=False)
    left = list((tmp_path / ".out.partial" / name).parent.glob(".*.tmp"))
    assert killed.returncode == -signal.SIGKILL and len(left) == 1
    prepare(wanted)
    prepare(replace(wanted, out=tmp_path / "calm"))
    assert content_of(tmp_path / "out") == content_of(tmp_path / "calm")


def test_parts_of_other_settings_are_neither_used_nor_thrown_away(tmp_path: Path) -> None:
    wanted = four_files(tmp_path / "text", bad=b"caf\xe9\n")
    with pytest.raises(DataError):
        prepare(wanted)
    kept = content_of(tmp_path / ".out.partial" / "work")
    sentence = "out.partial holds 3 finished parts of a run with other settings; run that command again, remove the"
    for changes in ({"valid_fraction": 0.3}, {"detokenizer": "ptb"}, {"dedup": True}):
        with pytest.raises(ConfigError, match=sentence):
            prepare(replace(wanted, **changes))  # type: ignore[arg-type]
    assert content_of(tmp_path / ".out.partial" / "work") == kept


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_documents_may_be_skipped_up_to_a_number(tmp_path: Path, workers: int) -> None:
    wanted = four_files(tmp_path / "text", bad=b"caf\xe9\n\xff\ngood\n")
    (tmp_path / "text" / "f1.txt").write_bytes(b"\xe9t\xe9\nwords\n")
    with pytest.raises(DataError, match="bad document number 2, and --skip-bad 1|3 documents are bad and skip_bad=1"):
        prepare(wanted, skip_bad=1, num_workers=workers)
    with pytest.raises(DataError, match="3 documents are bad and skip_bad=2 allows no more .*f1.txt at byte 0 is not"):
        prepare(wanted, skip_bad=2, num_workers=workers)
    said: list[str] = []
    made = prepare(wanted, skip_bad=3, num_workers=workers, say=said.append)
    assert made.left_out["bad"] == 3
    named = said[-1].removeprefix("3 bad documents are left out: ")
    assert [Path(one.split(" at byte ")[0]).name for one in named.split(", ")] == ["f1.txt", "f3.txt", "f3.txt"]
    texts = decoded(tmp_path / "out" / "train") + decoded(tmp_path / "out" / "valid")
    assert {"words", "good"} <= set(texts) and not any("\ufffd" in text for text in texts)


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_text_leaves_nothing_behind_where_nothing_was_finished(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match="bad.txt at byte 3 is not UTF-8"):
        prepare(request(path, tmp_path / "new" / "deep" / "out"), num_workers=workers)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.txt"]


def test_bad_requests_are_refused_before_anything_is_written(text: Path, tmp_path: Path) -> None:
    (tmp_path / "white.txt").write_text(" \n\n \n")
    (tmp_path / "one.txt").write_text("only one")
    cases: list[tuple[dict[str, object], type[BD3Error], str]] = [
        ({"valid_fraction": 0.9}, ConfigError, r"valid_fraction=0.9 is outside \[0, 0.5\]"),
        ({"sources": {}}, ConfigError, "no text was named"),
        ({"tokenizer": "./none"}, TokenizerError, "tokenizer ./none does not exist"),
        ({"tokenizer": "sentencepiece", "vocab_size": 9}, TokenizerError, "vocab_size=9 holds nothing"),
        ({"detokenizer": "x"}, ConfigError, "detokenizer='x' is not known"),
        ({"sources": {"train": TextFiles(paths=("gone.txt",))}}, DataError, "gone.txt does not exist"),
        (
            {"sources": {"train": TextFiles(paths=(str(tmp_path / "white.txt"),))}},
            DataError,
            "the train text holds no documents",
        ),
        (
            {"sources": {"train": TextFiles(paths=(str(tmp_path / "one.txt"),))}},
            DataError,
            "1 document with valid_fraction=0.2 leaves none for valid; give more documents, cut them smaller",
        ),
        (
            {"sources": {"test": TextFiles(paths=(str(text),))}, "tokenizer": "sentencepiece"},
            ConfigError,
            "tokenizer=sentencepiece is trained on train text and there is none",
        ),
    ]
    before = sorted(p.name for p in tmp_path.iterdir())
    for changes, kind, sentence in cases:
        with pytest.raises(kind, match=sentence):
            prepare(request(text, tmp_path / "out", **changes))
        assert sorted(p.name for p in tmp_path.iterdir()) == before
    with pytest.raises(ConfigError, match="num_workers=0 does no work"):
        prepare(request(text, tmp_path / "out"), num_workers=0)
    with pytest.raises(ConfigError, match="text.txt is a file; name a folder"):
        prepare(request(text, text))
    with pytest.raises(LaunchError, match=r"^out=.*below: '.*' cannot be written \(Not a directory\); choose another"):
        prepare(request(text, text / "below"))


def test_two_processes_do_not_prepare_the_same_folder(text: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    with held(partial, name="out"):
        with pytest.raises(FolderHeldError, match=rf"^out={tmp_path}/out is held by another launch \(host .*, process"):
            prepare(request(text, tmp_path / "out"))
        assert [p.name for p in partial.iterdir()] == ["lease.json"], "the other one's work is left alone"
    prepare(request(text, tmp_path / "out"))
    assert not partial.exists()


def test_splits_may_have_sources_of_their_own(text: Path, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("held out\n\n \n\nagain")
    sources = {n: TextFiles(paths=(str(p),)) for n, p in (("train", text), ("valid", tmp_path / "held.txt"))}
    packing = {"valid": {"append_eos": False, "wrap_special": True}}
    made = prepare(PrepareRequest(out=tmp_path / "out", sources=sources, packing=packing))
    assert decoded(tmp_path / "out" / "valid") == ["held out\n\n \n\n", "again"]
    assert ShardFolder(tmp_path / "out" / "valid").packing_rule == packing["valid"]
    assert ShardFolder(tmp_path / "out" / "train").packing_rule == {}
    assert made.num_documents["valid"] == 2


def test_documents_of_white_space_are_counted_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n \nthree\n")
    source = TextFiles(paths=(str(tmp_path / "a.txt"),), documents_are="line")
    prepare(PrepareRequest(out=tmp_path / "out", sources={"train": source}, valid_fraction=0.0))
    assert decoded(tmp_path / "out" / "train") == ["one", "two", "three"]
    assert ShardFolder(tmp_path / "out" / "train").header.left_out == {"empty": 2}
    assert not (tmp_path / "out" / "valid").exists()


class _Worker:
    """A part maker for the pool's own tests."""

    def open(self) -> None:
        return None

    def make(self, task: object, report: object) -> object:
        if task == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "fail":
            raise TokenizerError("task=fail failed; use another.")
        report(Progress(documents=1))  # type: ignore[operator]
        return task


def test_workers_deliver_report_fail_and_die_by_name() -> None:
    seen: list[Progress] = []
    delivered = []
    with pytest.raises(TokenizerError, match="task=fail failed"):
        for result in make_parts(_Worker(), [*range(7), "fail"], 2, seen.append):
            delivered.append(result)
    assert set(delivered) <= set(range(7)) and len(set(delivered)) == len(delivered) >= 5
    assert 5 <= len(seen) <= 7
    with pytest.raises(WorkStopped, match="a worker process ended with exit code -9; look for memory pressure"):
        list(make_parts(_Worker(), [1, "die", 2], 2, seen.append))
    assert list(make_parts(_Worker(), [], 4, seen.append)) == []


def test_the_bar_shows_rates_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(100.0, show=True) as bar:
        bar.skip(20.0)
        bar.advance(Progress(documents=3, tokens=4000, weight=80.0))
    shown = capsys.readouterr().err
    assert "documents/s" in shown and "tokens/s" in shown and "left" in shown and "100%" in shown
    with ProgressBar(1.0, show=False) as silent:
        silent.skip(0.5)
        silent.advance(Progress(weight=0.5))
    assert capsys.readouterr().err == ""
