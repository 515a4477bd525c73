"""Greedy answers of transformers' generate on a random Qwen2, the decoder of MiniCPM-V-2_6.

hf_generate.py HIDDEN,LAYERS,INTER,HEADS,KV,VOCAB PROMPT ANSWER BATCH,...
A step's time is that of all steps behind the first token, which the prompt's own run gives.
"""
import sys
import time

import torch
import transformers

hidden, layers, inter, heads, kv, vocab = map(int, sys.argv[1].split(","))
prompt, answer = int(sys.argv[2]), int(sys.argv[3])
device = "cuda" if torch.cuda.is_available() else "cpu"
config = transformers.Qwen2Config(
    vocab_size=vocab, hidden_size=hidden, intermediate_size=inter, num_hidden_layers=layers,
    num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=32768,
    rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False)
config._attn_implementation = "sdpa"
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
with torch.device(device):
    model = transformers.Qwen2ForCausalLM(config).eval()
print(f"{torch.cuda.get_device_name() if device == 'cuda' else device}, torch "
      f"{torch.__version__}, transformers {transformers.__version__}", flush=True)


def seconds(ids, tokens):
    best = float("inf")
    for _ in range(4):  # the first one warms up
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                       min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best


with torch.inference_mode():
    for batch in map(int, sys.argv[4].split(",")):
        ids = torch.randint(0, vocab - 1, (batch, prompt), device=device)
        first = seconds(ids, 1)
        step = (seconds(ids, answer) - first) / (answer - 1)
        print(f"PEER generate-{batch}: {batch / step:.1f} tok/s, {1e3 * step:.2f} ms a step, "
              f"prompts {1e3 * first:.1f} ms", flush=True)
