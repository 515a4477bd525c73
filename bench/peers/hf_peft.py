"""LoRA steps of transformers + PEFT on a random Qwen2, the decoder of MiniCPM-V-2_6, on one GPU.

hf_peft.py VARIANT CASE,... STEPS HIDDEN,LAYERS,INTER,HEADS,KV,VOCAB TOKENS
VARIANT: base (as Trainer runs it: autocast, F32 adapters), lean (adapters in bf16, logits of the
supervised rows alone), compiled (lean, each layer by torch.compile).
CASE: qkv qkv-ckpt all all-b4-ckpt small. Rows are random ids, the second half supervised.
"""
import statistics
import sys
import time

import peft
import torch
import torch.nn.functional as F
import transformers

variant, cases, steps = sys.argv[1], sys.argv[2].split(","), int(sys.argv[3])
hidden, layers, inter, heads, kv, vocab = map(int, sys.argv[4].split(","))
tokens = int(sys.argv[5])
WARM = 3
ATTENTION = ["q_proj", "k_proj", "v_proj"]
SEVEN = ATTENTION + ["o_proj", "gate_proj", "up_proj", "down_proj"]
lean = variant != "base"

config = transformers.Qwen2Config(
    vocab_size=vocab, hidden_size=hidden, intermediate_size=inter, num_hidden_layers=layers,
    num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=32768,
    rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False, use_cache=False)
config._attn_implementation = "sdpa"
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda"):
    model = transformers.Qwen2ForCausalLM(config)
torch.set_default_dtype(torch.float32)
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers "
      f"{transformers.__version__}, peft {peft.__version__}", flush=True)


def loss_of(wrapped, inner, ids, labels):
    if not lean:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return wrapped(input_ids=ids, labels=labels).loss
    states, targets = inner.model(input_ids=ids).last_hidden_state[:, :-1], labels[:, 1:]
    kept = targets != -100
    return F.cross_entropy(inner.lm_head(states[kept]).float(), targets[kept])


def run(case):
    rank, batch = (16 if case == "small" else 64), (4 if "b4" in case else 1)
    lora = peft.LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.05, bias="none",
        target_modules=ATTENTION if case.startswith("qkv") else SEVEN)
    wrapped = peft.get_peft_model(model, lora, autocast_adapter_dtype=not lean)
    wrapped.train()
    inner = wrapped.base_model.model
    if "ckpt" in case:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
        wrapped.enable_input_require_grads()
    else:
        inner.gradient_checkpointing_disable()
    if variant == "compiled":
        torch._dynamo.config.cache_size_limit = 64
        for layer in inner.model.layers:
            layer.compile()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(1)
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(WARM + steps):
        ids = torch.randint(0, vocab - 1, (batch, tokens), generator=generator).cuda()
        labels = ids.clone()
        labels[:, : tokens // 2] = -100
        torch.cuda.synchronize()
        begin = time.perf_counter()
        loss_of(wrapped, inner, ids, labels).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    timed = seconds[WARM:]
    middle, memory = statistics.median(timed), torch.cuda.max_memory_allocated() / 2**30
    print(f"PEER {variant} {case}: {batch * tokens / middle:.0f} tok/s (best "
          f"{batch * tokens / min(timed):.0f}), step {1e3 * middle:.1f} ms, first "
          f"{seconds[0]:.1f} s, {memory:.2f} GiB", flush=True)
    wrapped.unload()


for case in cases:
    try:
        run(case)
    except torch.OutOfMemoryError as failure:
        print(f"PEER {variant} {case} failed: {str(failure)[:200]}", flush=True)
    for parameter in model.parameters():
        parameter.grad = None
    torch.cuda.empty_cache()
