"""Trains a small MoE from scratch, for figures on a model that was never quantized: `quality.py --model OUT --copies`.

    python benchmarks/small_moe.py OUT --prompts PROMPTS.jsonl [--minutes 20]

Text: the chats of the train split, and the sources of this Python's standard library, cut by a byte-level BPE of its
own with 4,096 tokens. Model: Qwen3-MoE with 4 layers of 32 experts, 4 a token, rows of 256 (whole blocks of every
encoding of GGUF), 27 M parameters, 25 of them in experts. AdamW in bfloat16 over float32 weights, router loss of the
family, learning rate warmed up and then lowered to nothing over the minutes given; saved in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from emoe.analysis.recording import encode
from emoe.tasks import load_prompts

VOCABULARY, CONTEXT, ROWS = 4096, 192, 24  # tokens of a text, texts a step
CHATS = 0.4  # share of a step's texts
RATE, WARM_UP = 2e-3, 0.05  # learning rate, and the share of the time in which it rises
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")


def sources() -> list[str]:
    """Modules of the standard library, in the order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(each for each in folder.rglob("*.py") if "site-packages" not in each.parts)
    return [each.read_text(errors="replace") for each in files if each.stat().st_size < 200_000]


def tokenizer_of(texts: list[str]) -> Any:
    """Trained on these texts."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def config_of() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=256, moe_intermediate_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=32, num_experts_per_tok=4,
        norm_topk_prob=True, output_router_logits=True, router_aux_loss_coef=0.01, max_position_embeddings=2048,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def batches(chats: list[torch.Tensor], rest: torch.Tensor, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels [ROWS, CONTEXT]; chats are cut or padded, the rest is cut out of one long text."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.zeros((ROWS, CONTEXT), dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for row in range(ROWS):
            if row < CHATS * ROWS:
                text = chats[int(torch.randint(len(chats), (1,), generator=draw))][:CONTEXT]
            else:
                start = int(torch.randint(len(rest) - CONTEXT, (1,), generator=draw))
                text = rest[start : start + CONTEXT]
            ids[row, : len(text)] = labels[row, : len(text)] = text
        yield ids, labels


def rate_at(done: float) -> float:
    """Learning rate after this share of the time."""
    return RATE * (
        done / WARM_UP if done < WARM_UP else 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))
    )


def train(model: Any, steps: Iterator[tuple[torch.Tensor, torch.Tensor]], minutes: float) -> dict[str, float]:
    """Steps, tokens and the mean loss of the last fifty."""
    decayed = [each for each in model.parameters() if each.dim() > 1]
    others = [each for each in model.parameters() if each.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    started, losses = time.monotonic(), []
    with tqdm(total=60 * minutes, unit="s", bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s {postfix}") as bar:
        while (seconds := time.monotonic() - started) < 60 * minutes:
            for group in optimizer.param_groups:
                group["lr"] = rate_at(seconds / (60 * minutes))
            ids, labels = next(steps)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
            bar.n = seconds
            bar.set_postfix_str(f"step {len(losses)}, loss {sum(losses[-50:]) / len(losses[-50:]):.3f}")
    return {"steps": len(losses), "tokens": len(losses) * ROWS * CONTEXT, "loss": sum(losses[-50:]) / len(losses[-50:])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompts", type=Path, default=Path("../shared/prompts/prompts.jsonl"))
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of torch")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    if args.out.exists():
        parser.error(f"{args.out} is there already")
    if args.threads:
        torch.set_num_threads(args.threads)
    prompts, modules = list(load_prompts(args.prompts, "train")), sources()
    tokenizer = tokenizer_of([*(f"{each.prompt}\n{each.reference}" for each in prompts), *modules[::4]])
    chats = [encode(tokenizer, each)[0] for each in prompts]
    rest = torch.tensor(tokenizer("".join(modules[:600]), add_special_tokens=False)["input_ids"])
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config_of(), dtype=torch.float32, experts_implementation="grouped_mm")
    figures = train(model.train(), batches(chats, rest, args.seed), args.minutes)
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(json.dumps({"parameters": model.num_parameters(), **figures}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
