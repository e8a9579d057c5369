"""The baseline of cold_ask: import torch and transformers, load the model, generate N tokens."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, dtype, device, count, question = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
ids = tokenizer(question, return_tensors="pt").to(device)
with torch.inference_mode():
    answer = model.generate(**ids, min_new_tokens=int(count), max_new_tokens=int(count), do_sample=False)
tokenizer.decode(answer[0])
print(answer.shape[1] - ids["input_ids"].shape[1])
