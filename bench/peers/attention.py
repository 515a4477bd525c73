"""Attention forward and backward by scaled_dot_product_attention, bf16: what cuDNN and
FlashAttention-2 take on this card, beside `bench kernels`. TFLOP/s count the visible pairs, two and
five products."""
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

CASES = [
    ("causal, 28 heads of 128, 512", 1, 28, 128, 512, True),
    ("causal, 28 heads of 128, 2048", 1, 28, 128, 2048, True),
    ("causal, 28 heads of 128, 8192", 1, 28, 128, 8192, True),
    ("full, 16 heads of 72, 10 x 1024", 10, 16, 72, 1024, False),
    ("full, 16 heads of 64, 10 x 1024", 10, 16, 64, 1024, False),
    ("full, 16 heads of 80, 10 x 1024", 10, 16, 80, 1024, False),
]


def microseconds(action, times=30):
    for _ in range(5):
        action()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        action()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * begin.elapsed_time(end) / times


for name, sequences, heads, dim, n, causal in CASES:
    q, k, v = (torch.randn(sequences, heads, n, dim, device="cuda", dtype=torch.bfloat16,
                           requires_grad=True) for _ in range(3))
    flops = 4 * sequences * heads * n * n * dim * (0.5 if causal else 1)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        try:
            with sdpa_kernel(backend):
                forward = microseconds(
                    lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal))
                y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
                dy = torch.randn_like(y)
                backward = microseconds(lambda: y.backward(dy, retain_graph=True))
            print(f"SDPA {backend.name}, {name}: forward {forward:.0f} us "
                  f"({flops / forward / 1e6:.0f} TFLOP/s), backward {backward:.0f} us "
                  f"({2.5 * flops / backward / 1e6:.0f})", flush=True)
        except RuntimeError as failure:
            print(f"SDPA {backend.name}, {name}: {str(failure)[:100]}", flush=True)
