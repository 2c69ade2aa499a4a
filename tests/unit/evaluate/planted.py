"""A tiny model trained on a planted rule, exported with its tokenizer, and the rule as local tasks of the harness.

The rule: a word of three letters, "=", then each letter's successor in the alphabet abcda, ";". Blocks of 4 tokens.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from bd3_megatron.convert.to_hf import write_folder
from bd3_megatron.data.batch import CleanBatch
from bd3_megatron.data.convention import EvaluationConvention
from bd3_megatron.data.tokenizer_bytes import ByteTokenizer
from bd3_megatron.diffusion.token_nll import masked_token_nll
from bd3_megatron.evaluate.perplexity import ScoreSettings
from bd3_megatron.hf.configuration_bd3 import BD3Config
from bd3_megatron.hf.plain_bd3 import PlainBD3

BLOCK, LENGTH = 4, 24
LETTERS, SUCCESSORS = "abcd", "bcda"
STEPS, ROWS, RATE = 120, 16, 8e-3
CONVENTION = EvaluationConvention(packing="isolated", aligned_block=BLOCK)


def answer(word: str) -> str:
    """What the rule makes of a word."""
    return word.translate(str.maketrans(LETTERS, SUCCESSORS))


def word(chosen: random.Random) -> str:
    return "".join(chosen.choice(LETTERS) for _ in range(3))


def document(chosen: random.Random) -> str:
    """One or two words with their answers."""
    words = [word(chosen) for _ in range(chosen.randint(1, 2))]
    return "".join(f"{one}={answer(one)};" for one in words)


def trained_folder(folder: Path) -> Path:
    """Train on the rule and export."""
    tokenizer, chosen = ByteTokenizer(), random.Random(1)
    special = tokenizer.special
    tokenizer.save(folder / "tokenizer")
    config = BD3Config(
        vocab_size=tokenizer.vocab_size,
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LENGTH,
        block_size=BLOCK,
        mask_token_id=special.mask,
        bos_token_id=special.bos,
        eos_token_id=special.eos,
        pad_token_id=special.pad,
        evaluation=CONVENTION.to_json(),
    )
    model = PlainBD3(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    plan = ScoreSettings().plan(objective="block", block_size=BLOCK, mask_id=special.mask)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))
    for step in range(STEPS):
        texts = [[*document(chosen).encode(), *[special.eos] * BLOCK] for _ in range(ROWS)]
        tokens_BL = torch.tensor([ids + [special.pad] * (LENGTH - len(ids)) for ids in texts])
        index_B = torch.arange(ROWS) + step * ROWS
        clean = CleanBatch(tokens_BL=tokens_BL, index_B=index_B, is_padding_BL=tokens_BL == special.pad)
        noisy = plan.noisy(clean, torch.zeros(ROWS, dtype=torch.int64))
        assert noisy is not None
        masked_BL = noisy.is_masked_BL
        logits = model.lm_head(model.model(noisy.noisy_BL, tokens_BL)[masked_BL])
        nll_R = masked_token_nll(logits, tokens_BL[masked_BL], mask_id=special.mask)
        loss = (nll_R * noisy.weight_BL[masked_BL].float()).sum() / noisy.countable_BL.sum()
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 20) * (1 - step / STEPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    write_folder(model.state_dict(), config, folder / "hf", tokenizer_dir=folder / "tokenizer")
    return folder / "hf"


CHOICE_TASK = """
task: rule_choice
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/shots.jsonl, test: {folder}/words.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
fewshot_split: train
num_fewshot: 1
output_type: multiple_choice
doc_to_text: "{{{{word}}}}="
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
fewshot_delimiter: ";"
metric_list: [{{metric: acc}}]
"""
TEXT_TASK = """
task: rule_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
WRITE_TASK = """
task: rule_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/words.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{word}}}}="
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
generation_kwargs: {{until: [";"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
"""


def write_tasks(folder: Path) -> list[str]:
    """Three tasks from local files, in `folder`; returns the texts of the rolling one."""
    chosen = random.Random(2)

    def question() -> dict[str, object]:
        one = word(chosen)
        wrong = [word(chosen) for _ in range(4)]
        choices = [answer(one), *[other for other in wrong if other != answer(one)]][:4]
        chosen.shuffle(choices)
        return {"word": one, "answer": answer(one), "choices": choices, "label": choices.index(answer(one))}

    texts = [document(chosen) for _ in range(6)]
    lines = {"shots": [question() for _ in range(4)], "words": [question() for _ in range(8)]}
    lines["texts"] = [{"text": text} for text in texts]
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for name, task in (("choice", CHOICE_TASK), ("text", TEXT_TASK), ("write", WRITE_TASK)):
        (folder / f"{name}.yaml").write_text(task.format(folder=folder), "utf-8")
    return texts
