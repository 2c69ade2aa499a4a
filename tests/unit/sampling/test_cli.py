"""`bd3 sample`: flags, printed texts, the results file, the drawing; quick help."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import pytest

from bd3_megatron.cli import main
from bd3_megatron.errors import FileError
from bd3_megatron.hf.decoding_options_bd3 import DecodingOptions
from bd3_megatron.sampling.cli import OPTION_FLAGS, add_arguments, decoding_options, read_prompts, write_jsonl
from bd3_megatron.sampling.display import CLEAR_LINE, DenoisingDisplay
from bd3_megatron.sampling.generate import Sampler
from bd3_megatron.sampling.request import SampleResult
from tests.unit.hf.models import MASK
from tests.unit.sampling.folders import exported, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    return exported(root / "out", tokenizer_dir=write_tokenizer(root / "tokenizer"))


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["folder", *arguments])


def test_every_decoding_option_has_a_flag_and_no_default_of_its_own() -> None:
    assert set(OPTION_FLAGS) | {"seed", "stop_at_eos"} == set(DecodingOptions.__dataclass_fields__)
    assert decoding_options(parsed()) == {}
    given = decoding_options(parsed("--top-p", "0.9", "--rule", "ancestral", "--steps", "8", "--stop-at-eos"))
    assert given == {"top_p": 0.9, "rule": "ancestral", "steps": 8, "stop_at_eos": True}
    assert decoding_options(parsed("--no-stop-at-eos")) == {"stop_at_eos": False}


def test_a_prompt_is_continued_and_printed(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "samples.jsonl"
    arguments = ["sample", str(folder), "--prompt", "w2 w3", "--prompt-ids", "4,5", "--num-tokens", "8", "--seed", "6"]
    arguments.append("--no-stop-at-eos")
    assert main([*arguments, "--num-samples", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    sampler = Sampler.from_pretrained(folder)
    results = sampler.generate(["w2 w3", [4, 5]], num_tokens=8, seed=6, num_samples=2, stop_at_eos=False)
    assert printed.out.splitlines()[:2] == ["== prompt 0, sample 0 (length) ==", "w2 w3" + (results[0].text or "")]
    assert "tokens/s" in printed.err and "of the weight-read bound" in printed.err
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [line["tokens"] for line in lines] == [result.tokens for result in results]
    assert all(line["seed"] == 6 and line["num_forwards"] >= 8 and line["seconds"] > 0 for line in lines)
    assert [path.name for path in out.parent.iterdir()] == ["samples.jsonl"]


def test_streaming_prints_the_text_as_it_comes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(folder), "--num-tokens", "12", "--stream"]) == 0
    assert capsys.readouterr().out == (Sampler.from_pretrained(folder).generate("", num_tokens=12)[0].text or "") + "\n"
    assert main(["sample", str(folder), "--num-tokens", "12", "--stream", "--num-samples", "2"]) == 2
    assert "stream shows one text" in capsys.readouterr().err


def test_denoising_is_drawn_and_does_not_change_the_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(folder), "--num-tokens", "7", "--show-denoising"]) == 0
    lines = capsys.readouterr().out.splitlines()
    text = Sampler.from_pretrained(folder).generate("", num_tokens=7)[0].text
    assert lines[-1] == text and lines[0].count("░") == 2 and lines[0].startswith("[     0]")


def test_on_a_terminal_a_block_is_one_line_redrawn() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    display = DenoisingDisplay(None, MASK, out)
    display(0, 0, [5, MASK])
    display(0, 0, [5, 6])
    display(0, 2, [MASK, 7])
    display.finish()
    first, second = out.getvalue().splitlines()[:2]
    assert first.count(CLEAR_LINE.strip("\r")) == 2 or out.getvalue().count(CLEAR_LINE) == 3
    assert "░" in second or "░" in out.getvalue()
    assert out.getvalue().endswith("\n")


def test_masks_in_a_prompt_are_filled(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(folder), "--infill", "--prompt", "w2 [MASK] w4"]) == 0
    words = capsys.readouterr().out.split()
    expected = Sampler.from_pretrained(folder).infill("w2 [MASK] w4")[0].text
    assert words == (expected or "").split()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "num_tokens is missing; pass --num-tokens N"),
        (["--num-tokens", "4", "--prompt-ids", "1,x"], "prompt ids '1,x' are not numbers"),
        (
            ["--num-tokens", "4", "--prompt-file", "/nowhere/prompts.txt"],
            "prompts.txt failed (No such file or directory)",
        ),
        (["--num-tokens", "4", "--temperature", "-1"], "temperature=-1.0 is out of range"),
        (["--num-tokens", "4", "--rule", "magic"], "rule='magic' is unknown"),
        (["--num-tokens", "0"], "num_tokens=0 is out of range; use 1 to"),
        (["--num-tokens", "4", "--num-samples", "1000000000"], "num_samples=1000000000 is out of range"),
        (["--num-tokens", "4", "--batch-size", "-1"], "batch_size=-1 is out of range"),
        (["--num-tokens", "4", "--seed", "-1"], "seed=-1 is out of range; use 0 to 2^48 - 1"),
        (["--num-tokens", "4", "--device", "tpu9"], "device='tpu9' is not known; use cpu, cuda or cuda:NUMBER"),
        (["--num-tokens", "4", "--device", "cuda:99"], "device='cuda:99' is not visible to this process; use cpu"),
        (["--num-tokens", "4", "--device", "cpu", "--graphs"], "graphs were asked for on the CPU"),
        (
            ["--num-tokens", "4", "--prompt", "a\udcff"],
            "--prompt 'a\\udcff' is not UTF-8; give it in UTF-8, or token ids",
        ),
        (["--num-tokens", "4", "--stop", ""], "a stop string is empty"),
        (["--num-tokens", "4", "--out", "/proc/version/out.jsonl"], "out.jsonl cannot be written"),
        (["--num-tokens", "4", "--out", "/proc"], "/proc is a folder; name a file"),
        (["--num-tokens", "4", "--out", "/dev/null"], "/dev/null is a device or a pipe"),
        (["--num-tokens", "4", "--out", "a.jsonl", "--stream"], "leave one of them out"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2_before_anything_is_loaded(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "no/such/folder", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_the_smallest_temperature_is_greedy(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for temperature in ("0", "1e-100"):
        assert main(["sample", str(folder), "--num-tokens", "8", "--temperature", temperature]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_prompts_come_from_flags_and_files(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\n", "utf-8")
    arguments = parsed("--prompt", "zero", "--prompt-ids", "1 2", "--prompt-file", str(tmp_path / "prompts.txt"))
    assert read_prompts(arguments) == ["zero", [1, 2], "one", "two"]
    assert read_prompts(parsed()) == [""]


def test_a_results_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    result = SampleResult([1], None, [0], 0, 0, 1, 0.1, "length")
    with pytest.raises(FileError, match="cannot be written"):
        write_jsonl(tmp_path / "file" / "out.jsonl", [result], 0)


def test_prompt_files_are_read_as_training_text_is(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffOnce\r\n\r\nthree\rfour \u2028 five\n".encode())
    assert read_prompts(parsed("--prompt-file", str(tmp_path / "prompts.txt"))) == [
        "Once",
        "",
        "three",
        "four \u2028 five",
    ]
