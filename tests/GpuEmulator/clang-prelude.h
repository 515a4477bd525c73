// The built-ins that NVRTC knows without a header, for clang -x cuda without the CUDA toolkit.
// Math functions are made of the hardware's approximations and a correction, good to a few units in
// the last place on the emulator, whose approximations are correctly rounded.
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __shared__ __attribute__((shared))
#define __constant__ __attribute__((constant))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...) __attribute__((launch_bounds(__VA_ARGS__)))
// nodebug: reports then name the line of the kernel that calls, as NVRTC has it.
#define CPMX_FN static __device__ __forceinline__ __attribute__((nodebug))

struct dim3 { unsigned x, y, z; };
struct CpmxTid { __declspec(property(get = gx)) unsigned x; __declspec(property(get = gy)) unsigned y;
  __declspec(property(get = gz)) unsigned z;
  __device__ __forceinline__ static unsigned gx() { return __nvvm_read_ptx_sreg_tid_x(); }
  __device__ __forceinline__ static unsigned gy() { return __nvvm_read_ptx_sreg_tid_y(); }
  __device__ __forceinline__ static unsigned gz() { return __nvvm_read_ptx_sreg_tid_z(); } };
struct CpmxCtaid { __declspec(property(get = gx)) unsigned x; __declspec(property(get = gy)) unsigned y;
  __declspec(property(get = gz)) unsigned z;
  __device__ __forceinline__ static unsigned gx() { return __nvvm_read_ptx_sreg_ctaid_x(); }
  __device__ __forceinline__ static unsigned gy() { return __nvvm_read_ptx_sreg_ctaid_y(); }
  __device__ __forceinline__ static unsigned gz() { return __nvvm_read_ptx_sreg_ctaid_z(); } };
struct CpmxNtid { __declspec(property(get = gx)) unsigned x; __declspec(property(get = gy)) unsigned y;
  __declspec(property(get = gz)) unsigned z;
  __device__ __forceinline__ static unsigned gx() { return __nvvm_read_ptx_sreg_ntid_x(); }
  __device__ __forceinline__ static unsigned gy() { return __nvvm_read_ptx_sreg_ntid_y(); }
  __device__ __forceinline__ static unsigned gz() { return __nvvm_read_ptx_sreg_ntid_z(); } };
struct CpmxNctaid { __declspec(property(get = gx)) unsigned x; __declspec(property(get = gy)) unsigned y;
  __declspec(property(get = gz)) unsigned z;
  __device__ __forceinline__ static unsigned gx() { return __nvvm_read_ptx_sreg_nctaid_x(); }
  __device__ __forceinline__ static unsigned gy() { return __nvvm_read_ptx_sreg_nctaid_y(); }
  __device__ __forceinline__ static unsigned gz() { return __nvvm_read_ptx_sreg_nctaid_z(); } };
extern const __device__ CpmxTid threadIdx; extern const __device__ CpmxCtaid blockIdx;
extern const __device__ CpmxNtid blockDim; extern const __device__ CpmxNctaid gridDim;
#define warpSize 32

#define CPMX_VECTOR(T, N) \
  struct __attribute__((aligned(2 * sizeof(T)))) N##2 { T x, y; }; \
  struct __attribute__((aligned(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)))) N##4 { T x, y, z, w; }; \
  CPMX_FN N##2 make_##N##2(T x, T y) { N##2 v; v.x = x; v.y = y; return v; } \
  CPMX_FN N##4 make_##N##4(T x, T y, T z, T w) { N##4 v; v.x = x; v.y = y; v.z = z; v.w = w; return v; }
CPMX_VECTOR(unsigned, uint) CPMX_VECTOR(int, int) CPMX_VECTOR(float, float)
CPMX_VECTOR(unsigned short, ushort) CPMX_VECTOR(unsigned char, uchar) CPMX_VECTOR(unsigned long long, ulonglong)
CPMX_VECTOR(double, double)

CPMX_FN unsigned __float_as_uint(float x) { unsigned r; asm("mov.b32 %0, %1;" : "=r"(r) : "f"(x)); return r; }
CPMX_FN int __float_as_int(float x) { int r; asm("mov.b32 %0, %1;" : "=r"(r) : "f"(x)); return r; }
CPMX_FN float __uint_as_float(unsigned x) { float r; asm("mov.b32 %0, %1;" : "=f"(r) : "r"(x)); return r; }
CPMX_FN float __int_as_float(int x) { float r; asm("mov.b32 %0, %1;" : "=f"(r) : "r"(x)); return r; }
CPMX_FN long long __double_as_longlong(double x) { long long r; asm("mov.b64 %0, %1;" : "=l"(r) : "d"(x)); return r; }
CPMX_FN double __longlong_as_double(long long x) { double r; asm("mov.b64 %0, %1;" : "=d"(r) : "l"(x)); return r; }
CPMX_FN float __uint2float_rn(unsigned x) { return (float)x; }
CPMX_FN float __int2float_rn(int x) { return (float)x; }
CPMX_FN int __float2int_rn(float x) { int r; asm("cvt.rni.s32.f32 %0, %1;" : "=r"(r) : "f"(x)); return r; }
CPMX_FN int __float2int_rz(float x) { return (int)x; }

CPMX_FN unsigned long __cvta_generic_to_shared(const void* p) {
  unsigned long r; asm("cvta.to.shared.u64 %0, %1;" : "=l"(r) : "l"(p)); return r; }

// Not clang's own built-in: clang 14 takes it for granted that a barrier leaves a variable alone whose
// address nobody has, and then reads __shared__ variables before the barrier instead of behind it.
#define __syncthreads() asm volatile("bar.sync 0;" ::: "memory")
CPMX_FN void __syncwarp(unsigned m = 0xffffffffu) { asm volatile("bar.warp.sync %0;" ::"r"(m) : "memory"); }
CPMX_FN void __threadfence() { asm volatile("membar.gl;" ::: "memory"); }
CPMX_FN void __threadfence_block() { asm volatile("membar.cta;" ::: "memory"); }
CPMX_FN void __trap() { asm volatile("trap;"); }

#define CPMX_SHUFFLE(NAME, MODE, CLAMP) \
  CPMX_FN unsigned NAME(unsigned m, unsigned v, int b, int w = 32) { unsigned r; \
    asm volatile("shfl.sync." MODE ".b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(v), "r"(b), "r"(((32 - w) << 8) | CLAMP), "r"(m)); return r; } \
  CPMX_FN int NAME(unsigned m, int v, int b, int w = 32) { return (int)NAME(m, (unsigned)v, b, w); } \
  CPMX_FN float NAME(unsigned m, float v, int b, int w = 32) { return __uint_as_float(NAME(m, __float_as_uint(v), b, w)); } \
  CPMX_FN double NAME(unsigned m, double v, int b, int w = 32) { unsigned long long x = __double_as_longlong(v); \
    unsigned lo = NAME(m, (unsigned)x, b, w), hi = NAME(m, (unsigned)(x >> 32), b, w); \
    return __longlong_as_double(((unsigned long long)hi << 32) | lo); }
CPMX_SHUFFLE(__shfl_sync, "idx", 0x1f)
CPMX_SHUFFLE(__shfl_up_sync, "up", 0)
CPMX_SHUFFLE(__shfl_down_sync, "down", 0x1f)
CPMX_SHUFFLE(__shfl_xor_sync, "bfly", 0x1f)
CPMX_FN int __any_sync(unsigned m, int p) { return __nvvm_vote_any_sync(m, p); }
CPMX_FN int __all_sync(unsigned m, int p) { return __nvvm_vote_all_sync(m, p); }
CPMX_FN unsigned __ballot_sync(unsigned m, int p) { return __nvvm_vote_ballot_sync(m, p); }
CPMX_FN unsigned __match_any_sync(unsigned m, unsigned v) { return __nvvm_match_any_sync_i32(m, v); }
CPMX_FN unsigned __activemask() { unsigned r; asm volatile("activemask.b32 %0;" : "=r"(r)); return r; }
#define CPMX_REDUX(NAME, OP) \
  CPMX_FN unsigned NAME(unsigned m, unsigned v) { unsigned r; asm volatile("redux.sync." OP ".u32 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(m)); return r; } \
  CPMX_FN int NAME(unsigned m, int v) { int r; asm volatile("redux.sync." OP ".s32 %0, %1, %2;" : "=r"(r) : "r"(v), "r"(m)); return r; }
CPMX_REDUX(__reduce_add_sync, "add") CPMX_REDUX(__reduce_min_sync, "min") CPMX_REDUX(__reduce_max_sync, "max")

#define CPMX_ATOMIC(NAME, T, OP, C) \
  CPMX_FN T NAME(T* p, T v) { T r; asm volatile("atom." OP " %0, [%1], %2;" : "=" C(r) : "l"(p), C(v) : "memory"); return r; }
CPMX_ATOMIC(atomicAdd, float, "add.f32", "f") CPMX_ATOMIC(atomicAdd, int, "add.s32", "r")
CPMX_ATOMIC(atomicAdd, unsigned, "add.u32", "r") CPMX_ATOMIC(atomicAdd, unsigned long long, "add.u64", "l")
CPMX_ATOMIC(atomicExch, int, "exch.b32", "r") CPMX_ATOMIC(atomicExch, unsigned, "exch.b32", "r")
CPMX_ATOMIC(atomicInc, unsigned, "inc.u32", "r") CPMX_ATOMIC(atomicOr, unsigned, "or.b32", "r")
CPMX_ATOMIC(atomicOr, int, "or.b32", "r") CPMX_ATOMIC(atomicAnd, unsigned, "and.b32", "r")
CPMX_ATOMIC(atomicMax, int, "max.s32", "r") CPMX_ATOMIC(atomicMin, int, "min.s32", "r")
CPMX_ATOMIC(atomicMax, unsigned, "max.u32", "r") CPMX_ATOMIC(atomicMin, unsigned, "min.u32", "r")
CPMX_FN unsigned atomicCAS(unsigned* p, unsigned a, unsigned b) { unsigned r;
  asm volatile("atom.cas.b32 %0, [%1], %2, %3;" : "=r"(r) : "l"(p), "r"(a), "r"(b) : "memory"); return r; }
CPMX_FN int atomicCAS(int* p, int a, int b) { return (int)atomicCAS((unsigned*)p, (unsigned)a, (unsigned)b); }

CPMX_FN unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((unsigned long long)a * b) >> 32); }
CPMX_FN int __popc(unsigned x) { return __builtin_popcount(x); }
CPMX_FN int __ffs(int x) { return __builtin_ffs(x); }
CPMX_FN int __clz(int x) { int r; asm("clz.b32 %0, %1;" : "=r"(r) : "r"(x)); return r; }
CPMX_FN unsigned __brev(unsigned x) { return __builtin_bitreverse32(x); }
CPMX_FN unsigned __byte_perm(unsigned a, unsigned b, unsigned s) { unsigned r; asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(s)); return r; }
#define CPMX_MINMAX(T) CPMX_FN T min(T a, T b) { return a < b ? a : b; } CPMX_FN T max(T a, T b) { return a > b ? a : b; }
CPMX_MINMAX(int) CPMX_MINMAX(unsigned) CPMX_MINMAX(long long) CPMX_MINMAX(unsigned long long)
CPMX_FN int abs(int x) { return x < 0 ? -x : x; }
template <class T> CPMX_FN T __ldg(const T* p) { return *p; }

CPMX_FN float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
CPMX_FN double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
CPMX_FN float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
CPMX_FN float __fmul_rn(float a, float b) { float r; asm("mul.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
CPMX_FN float __fadd_rn(float a, float b) { float r; asm("add.rn.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; }
CPMX_FN float fmaxf(float a, float b) { return __nvvm_fmax_f(a, b); }
CPMX_FN float fminf(float a, float b) { return __nvvm_fmin_f(a, b); }
CPMX_FN float fabsf(float x) { return __builtin_fabsf(x); }
CPMX_FN float copysignf(float a, float b) { return __uint_as_float((__float_as_uint(a) & 0x7fffffffu) | (__float_as_uint(b) & 0x80000000u)); }
CPMX_FN float sqrtf(float x) { return __nvvm_sqrt_rn_f(x); }
CPMX_FN double sqrt(double x) { return __nvvm_sqrt_rn_d(x); }
CPMX_FN float __fsqrt_rn(float x) { return __nvvm_sqrt_rn_f(x); }
CPMX_FN float __frcp_rn(float x) { return __nvvm_rcp_rn_f(x); }
CPMX_FN float rsqrtf(float x) { return __nvvm_rsqrt_approx_f(x); }
CPMX_FN float __fdividef(float a, float b) { return __nvvm_div_approx_f(a, b); }
CPMX_FN float floorf(float x) { return __builtin_floorf(x); }
CPMX_FN float ceilf(float x) { return __builtin_ceilf(x); }
CPMX_FN float truncf(float x) { return __builtin_truncf(x); }
CPMX_FN float rintf(float x) { return __builtin_rintf(x); }
CPMX_FN float __saturatef(float x) { return __nvvm_saturate_f(x); }
CPMX_FN bool isfinite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }
CPMX_FN bool isnan(float x) { return x != x; }
CPMX_FN bool isinf(float x) { return (__float_as_uint(x) & 0x7fffffffu) == 0x7f800000u; }
CPMX_FN float exp2f(float x) { return __nvvm_ex2_approx_f(x); }
CPMX_FN float log2f(float x) { return __nvvm_lg2_approx_f(x); }
CPMX_FN float __expf(float x) { return __nvvm_ex2_approx_f(x * 1.44269504f); }
CPMX_FN float __logf(float x) { return __nvvm_lg2_approx_f(x) * 0.69314718f; }
CPMX_FN float expf(float x) {
  // x / ln 2 as two floats; the second becomes a factor near one.
  float t = x * 1.44269502f, e = __builtin_fmaf(x, 1.44269502f, -t) + x * 1.92596299e-8f;
  float y = __nvvm_ex2_approx_f(t);
  return isfinite(y) && y != 0 ? __builtin_fmaf(y, e * 0.69314718f, y) : y; }
CPMX_FN float logf(float x) { return (float)((double)__nvvm_lg2_approx_f(x) * 0.693147180559945309); }
CPMX_FN float log1pf(float x) { float u = 1.0f + x; return u == 1.0f ? x : logf(u) * (x / (u - 1.0f)); }
CPMX_FN float powf(float x, float y) {
  float l = log2f(x), t = y * l, e = __builtin_fmaf(y, l, -t);
  float r = __nvvm_ex2_approx_f(t); return __builtin_fmaf(r, e * 0.69314718f, r); }
CPMX_FN float cpmx_reduced(float x) { double n = __builtin_rint((double)x * 0.15915494309189533577);
  return (float)((double)x - n * 6.283185307179586477); }
CPMX_FN float sinf(float x) { return __nvvm_sin_approx_f(cpmx_reduced(x)); }
CPMX_FN float cosf(float x) { return __nvvm_cos_approx_f(cpmx_reduced(x)); }
CPMX_FN void sincosf(float x, float* s, float* c) { *s = sinf(x); *c = cosf(x); }
CPMX_FN float __sinf(float x) { return __nvvm_sin_approx_f(x); }
CPMX_FN float __cosf(float x) { return __nvvm_cos_approx_f(x); }
CPMX_FN float tanhf(float x) {
  float a = fabsf(x), q = x * x;
  if (a < 0.25f) return x * (1.0f + q * (-0.333333333f + q * (0.133333333f + q * (-0.0539682540f + q * 0.0218694885f))));
  return copysignf(1.0f - 2.0f / (expf(2.0f * a) + 1.0f), x); }
CPMX_FN float erff(float x) {
  float a = fabsf(x);
  if (a < 0.5f) { float q = x * x; return x * (1.12837917f + q * (-0.376126389f + q * (0.112837917f + q * (-0.0268661706f + q * 0.00522397762f)))); }
  // Chebyshev fit of erfc, Numerical Recipes 6.2: 1.2e-7 of erfc.
  float t = 1.0f / (1.0f + 0.5f * a);
  float p = t * expf(-a * a - 1.26551223f + t * (1.00002368f + t * (0.37409196f + t * (0.09678418f + t * (-0.18628806f +
    t * (0.27886807f + t * (-1.13520398f + t * (1.48851587f + t * (-0.82215223f + t * 0.17087277f)))))))));
  return copysignf(1.0f - p, x); }
