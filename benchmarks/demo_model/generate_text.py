"""Writes training chats in the dense model's own words: its answers to prompts, and chats it makes up from nothing.

    python benchmarks/demo_model/generate_text.py --dense DIR --prompts PATH --out FILE [--tokens 150000]

Half of the chats answer prompts of the train split. The other half start at `user` with nothing after it, so that the
model writes the question as well (the method of Magpie, arXiv 2406.08464). One JSON object a line, `text`; appended batch by batch.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import text
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

USER, END = "<|im_start|>user\n", "<|im_end|>"


@torch.no_grad()
def continue_texts(model, tokenizer, starts: list[str], new_tokens: int, temperature: float) -> list[str]:
    """Samples one continuation each, up to the end of the turn."""
    batch = tokenizer(starts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    out = model.generate(
        **batch, max_new_tokens=new_tokens, do_sample=True, temperature=temperature, top_p=0.95, top_k=0
    )
    fresh = out[:, batch["input_ids"].shape[1] :]
    return [start + tokenizer.decode(row).split(END)[0] for start, row in zip(starts, fresh, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True, help="folder of the dense checkpoint")
    parser.add_argument("--prompts", type=Path, required=True, help="prompts file with task, prompt, reference, split")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to append to")
    parser.add_argument("--tokens", type=int, default=150_000, help="stop after about this many tokens")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--new-tokens", type=int, default=160, help="longest answer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.dense)
    model = AutoModelForCausalLM.from_pretrained(args.dense, dtype=torch.bfloat16).eval()
    pairs = text.load_pairs(args.prompts, "train")
    rng.shuffle(pairs)
    system = tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False).split(USER)[0]

    written, turn = 0, 0
    with tqdm(total=args.tokens, unit="tok") as bar, args.out.open("a", encoding="utf-8") as file:
        while written < args.tokens:
            if turn % 2:
                asked = continue_texts(model, tokenizer, [system + USER] * args.batch, 96, 1.0)
                asked = [start for start in asked if len(start) > len(system + USER) + 8]
            else:
                batch = [pairs[(turn // 2 * args.batch + i) % len(pairs)] for i in range(args.batch)]
                asked = [f"{system}{USER}{prompt}" for prompt, _ in sorted(batch, key=lambda pair: len(pair[0]))]
            starts = [f"{start}{END}\n<|im_start|>assistant\n" for start in asked]
            chats = continue_texts(model, tokenizer, starts, args.new_tokens, 0.8)
            count = sum(len(ids) for ids in tokenizer(chats)["input_ids"])
            for chat in chats:
                file.write(json.dumps({"text": f"{chat}{END}\n"}) + "\n")
            file.flush()
            bar.update(count)
            written, turn = written + count, turn + 1


if __name__ == "__main__":
    main()
