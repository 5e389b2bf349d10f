"""Accuracy of an HF folder on a prompt file, with `transformers` alone: nothing of the trainer is imported.

`python examples/quickstart/hf_accuracy.py FOLDER PROMPTS.jsonl NUM_SAMPLES` samples at temperature 1, as the
trainer's evaluation does, and prints one JSON object: {"accuracy": ..., "num_samples": ...}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

MAX_RESPONSE_TOKENS = 5


@torch.inference_mode()
def main(folder: str, prompts_path: str, num_samples: int) -> None:
    lines = [json.loads(line) for line in Path(prompts_path).read_text().splitlines()]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [line["prompt"] for line in lines]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    torch.manual_seed(0)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=MAX_RESPONSE_TOKENS,
        num_return_sequences=num_samples,
    )
    responses = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    answers = [line["answer"] for line in lines for _ in range(num_samples)]
    num_right = sum(response == answer for response, answer in zip(responses, answers, strict=True))
    print(json.dumps({"accuracy": num_right / len(answers), "num_samples": len(answers)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
