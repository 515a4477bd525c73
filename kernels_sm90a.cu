// Device code for Hopper alone (sm_90a): attention by warpgroup matrix instructions. Compiled as a
// module of its own, for BF16 activations, where the device and NVRTC know sm_90a; everywhere else
// kernels.cu serves. Conventions, names and semantics are those of kernels.cu, macros from the host
// too.
//
//   1  primitives: wgmma, matrix descriptors, mbarriers, copies, named barriers
//   2  packed sequences, as in kernels.cu
//   3  attention, backward
//
// How work is divided: a block is one warpgroup (4 warps) that moves data and gives its registers
// away, and two that multiply. Tiles come by asynchronous copies and mbarriers tell of their
// arrival; products read shared memory through descriptors.

// ---- 1. primitives ------------------------------------------------------------------------------

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short bf16;
typedef bf16 real;

#define DEVICE static __device__ __forceinline__
#define WARP 32
#define WARPGROUP 128
#define ALL_LANES 0xffffffffu

DEVICE float widen(bf16 x) { return __uint_as_float((u32)x << 16); }

// Two values in one word, the first in the low half.
DEVICE u32 narrow2(float low, float high)
{
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// -- swizzled tiles --
//
// A tile of rows lies in shared memory as chunks of 64 columns of BF16, one after the other: of
// each chunk all rows, 128 bytes a row, so that 8 rows are 1024 bytes. The eight 16-byte pieces of
// a row change places by the row's number modulo 8 (the hardware's 128-byte swizzle, a pattern of
// the address: tiles start at multiples of 1024). The 32-byte swizzle is the same for chunks of 16
// columns: 32 bytes a row, two pieces, which change places in rows 4 to 7 of 8.

#define CHUNK_COLS 64
#define ROW_BYTES 128

// From the tile's start to 16-byte piece `piece` (of 8) of a row of a chunk of 64 columns.
DEVICE u32 swizzled(int row, int piece) { return row * ROW_BYTES + (piece ^ (row & 7)) * 16; }

// The same for a chunk of 16 columns; piece 0 or 1.
DEVICE u32 swizzled_narrow(int row, int piece) { return row * 32 + (piece ^ (row >> 2 & 1)) * 16; }

#define SWIZZLE_128 1
#define SWIZZLE_64 2
#define SWIZZLE_32 3

// A matrix in shared memory as wgmma reads it. `leading` and `stride` are in bytes. The operand is
// M (or N) by 16 of K:
//   K-major (16 of K lie side by side in a row): rows of M or N; `stride` from 8 rows to the next
//       8, `leading` unused. The next 16 of K are 32 bytes further, in the next chunk after the
//       last.
//   M- or N-major (transposed; M or N lie side by side): rows of K; `stride` from 8 rows to the
//       next 8, `leading` from a chunk to the next. The next 16 of K are 16 rows further.
// Only the address differs between the operands of a product: add bytes / 16 to the low word.
DEVICE u64 matrix_descriptor(u32 address, int leading, int stride, int swizzle = SWIZZLE_128)
{
    return (u64)(address >> 4 & 0x3fff) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32
        | (u64)swizzle << 62;
}

// The descriptor of what lies `bytes` (a multiple of 16) further.
DEVICE u64 further(u64 descriptor, int bytes) { return descriptor + (u64)(bytes >> 4); }

// -- wgmma: d[64, N] = or += a[64, 16] b[16, N] by the four warps of a warpgroup --
//
// d and a in registers: warp w has rows 16w to 16w + 15; lane 4g + t has of d in
// d[4n + 0 to 3] the elements [g][8n + 2t, 2t + 1] and [g + 8][8n + 2t, 2t + 1], and of a the
// pairs [g][2t], [g + 8][2t], [g][8 + 2t], [g + 8][8 + 2t]. So d of columns 16j to 16j + 15,
// narrowed, is an a. Products run behind the program's back: their d and a may not be touched
// between multiply_begin and multiply_wait.

#define WORDS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WORDS_32 WORDS_16 \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WORDS_40 WORDS_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WORDS_48 WORDS_40 \
    ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WORDS_64 WORDS_48 \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WORDS_128 WORDS_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78" \
    ", %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93" \
    ", %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108" \
    ", %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123" \
    ", %124, %125, %126, %127"
#define FLOATS_8(i)                                                                                \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),    \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define FLOATS_16 FLOATS_8(0), FLOATS_8(8)
#define FLOATS_32 FLOATS_16, FLOATS_8(16), FLOATS_8(24)
#define FLOATS_40 FLOATS_32, FLOATS_8(32)
#define FLOATS_48 FLOATS_40, FLOATS_8(40)
#define FLOATS_64 FLOATS_48, FLOATS_8(48), FLOATS_8(56)
#define FLOATS_128                                                                                 \
    FLOATS_64, FLOATS_8(64), FLOATS_8(72), FLOATS_8(80), FLOATS_8(88), FLOATS_8(96),               \
        FLOATS_8(104), FLOATS_8(112), FLOATS_8(120)

// d += a b, or d = a b where `add` is 0. A and B say where the operand is M- or N-major. Overloads
// by the number of d's floats: N / 2 for N of 32, 64, 80, 96, 128, 256.
#define DEFINE_MULTIPLY(N, COUNT, I0, I1, I2, I3, I4, I5, I6)                                      \
    template <bool A, bool B>                                                                      \
    DEVICE void multiply(float (&d)[COUNT], u64 a, u64 b, int add)                                 \
    {                                                                                              \
        asm volatile("{.reg .pred p; setp.ne.b32 p, %" I2 ", 0; "                                  \
            "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WORDS_##COUNT             \
            "}, %" I0 ", %" I1 ", p, 1, 1, %" I3 ", %" I4 ";}"                                     \
            : FLOATS_##COUNT : "l"(a), "l"(b), "r"(add), "n"((int)A), "n"((int)B));                \
    }                                                                                              \
    template <bool B>                                                                              \
    DEVICE void multiply(float (&d)[COUNT], const u32 (&a)[4], u64 b, int add)                     \
    {                                                                                              \
        asm volatile("{.reg .pred p; setp.ne.b32 p, %" I5 ", 0; "                                  \
            "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WORDS_##COUNT             \
            "}, {%" I0 ", %" I1 ", %" I2 ", %" I3 "}, %" I4 ", p, 1, 1, %" I6 ";}"                 \
            : FLOATS_##COUNT                                                                       \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"((int)B));          \
    }

DEFINE_MULTIPLY(32, 16, "16", "17", "18", "19", "20", "21", "22")
DEFINE_MULTIPLY(64, 32, "32", "33", "34", "35", "36", "37", "38")
DEFINE_MULTIPLY(80, 40, "40", "41", "42", "43", "44", "45", "46")
DEFINE_MULTIPLY(96, 48, "48", "49", "50", "51", "52", "53", "54")
DEFINE_MULTIPLY(128, 64, "64", "65", "66", "67", "68", "69", "70")
DEFINE_MULTIPLY(256, 128, "128", "129", "130", "131", "132", "133", "134")

// Before the first product after registers or shared memory changed.
DEVICE void multiply_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of products.
DEVICE void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until no more than the N latest groups of products are under way.
template <int N> DEVICE void multiply_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
}

// The compiler sees no tie between multiply_wait and the d it waits for: this keeps reads of d
// behind it, and writes of d before multiply_begin.
template <int N> DEVICE void hold(float (&d)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i]) :: "memory");
}

// Four 8x8 matrices to shared memory: matrix m lies in r[m] as multiply's d, narrowed, does; lanes
// 8m to 8m + 7 give the addresses of its rows.
DEVICE void store_matrix_x4(u32 address, const u32 (&r)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
        :: "r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

// -- mbarriers: 8 bytes of shared memory that count arrivals, phase after phase --

// `count` arrivals end each phase.
DEVICE void barrier_init(u32 barrier, int count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}

// Makes barriers just initialised known to asynchronous operations; a block's barrier follows.
DEVICE void barrier_init_done()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

DEVICE void barrier_arrive(u32 barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

// An arrival that also tells how many bytes bulk copies will bring in this phase.
DEVICE void barrier_arrive_expecting(u32 barrier, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
        :: "r"(barrier), "r"(bytes) : "memory");
}

// An arrival when all copies that this thread started with copy_async_* are there.
DEVICE void barrier_arrive_after_copies(u32 barrier)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(barrier) : "memory");
}

// Waits for the end of the phase of this parity (the first phase has 0; the one before it counts as
// over). Arrivals' writes are then visible, to products after async_fence.
DEVICE void barrier_wait(u32 barrier, int parity)
{
    u32 done;
    do
    {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
            "selp.u32 %0, 1, 0, p;}" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    } while (!done);
}

// -- copies --

// Orders this thread's ordinary accesses to memory, and those it knows of, before later reads and
// writes of products and bulk copies.
DEVICE void async_fence() { asm volatile("fence.proxy.async;" ::: "memory"); }
DEVICE void async_fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Starts a copy of 16 bytes to shared memory, of zeros when not valid; both addresses are multiples
// of 16.
DEVICE void copy_async_16(u32 address, const void* from, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
        :: "r"(address), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

DEVICE void copy_async_8(u32 address, const void* from, bool valid)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
        :: "r"(address), "l"(from), "r"(valid ? 8 : 0) : "memory");
}

// Bulk copies by one thread, of multiples of 16 bytes at multiples of 16: from shared memory to
// global, or added to the floats there. One group each bulk_commit.
DEVICE void bulk_store(void* to, u32 from, int bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
        :: "l"(to), "r"(from), "r"(bytes) : "memory");
}

DEVICE void bulk_add_floats(void* to, u32 from, int bytes)
{
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
        :: "l"(to), "r"(from), "r"(bytes) : "memory");
}

DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all groups have read their shared memory,
// or until what they wrote is visible.
DEVICE void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
DEVICE void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// -- warps among themselves --

// A barrier of `threads` threads of a block by its number, 1 to 15 (0 is __syncthreads), and an
// arrival that does not wait.
DEVICE void group_sync(int number, int threads)
{
    asm volatile("bar.sync %0, %1;" :: "r"(number), "r"(threads) : "memory");
}

DEVICE void group_arrive(int number, int threads)
{
    asm volatile("bar.arrive %0, %1;" :: "r"(number), "r"(threads) : "memory");
}

// A warpgroup hands registers back, or waits for that many; per thread, a multiple of 8.
template <int COUNT> DEVICE void keep_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT));
}

template <int COUNT> DEVICE void take_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT));
}

// A counter in global memory that orders blocks: what a block wrote before it stores is there for
// the one that loads the value.
DEVICE int load_acquire(const int* p)
{
    int x;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

DEVICE void store_release(int* p, int x)
{
    asm volatile("st.release.gpu.global.b32 [%0], %1;" :: "l"(p), "r"(x) : "memory");
}
