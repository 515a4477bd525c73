// Device code for Hopper alone (sm_90a): attention by warpgroup matrix instructions. Compiled as a
// module of its own, for BF16 activations, where the device and NVRTC know sm_90a; everywhere else
// kernels.cu serves. Conventions, names and semantics are those of kernels.cu, macros from the host
// too.
//
//   1  primitives: wgmma, matrix descriptors, mbarriers, copies, named barriers
//   2  packed sequences and softmax, as in kernels.cu
//   3  attention, forward
//   4  attention, backward
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
DEVICE u64 further(u64 descriptor, int bytes)
{
    u32 low = (u32)descriptor + (u32)(bytes >> 4); // the address has its 14 bits for itself
    return (descriptor & 0xffffffff00000000) | low;
}

// -- wgmma: d[64, N] = or += a[64, 16] b[16, N] by the four warps of a warpgroup --
//
// d and a in registers: warp w has rows 16w to 16w + 15; lane 4g + t has of d in
// d[4n + 0 to 3] the elements [g][8n + 2t, 2t + 1] and [g + 8][8n + 2t, 2t + 1], and of a the
// pairs [g][2t], [g + 8][2t], [g][8 + 2t], [g + 8][8 + 2t]. So d of columns 16j to 16j + 15,
// narrowed, is an a. Products run behind the program's back: their d and a may not be touched
// between multiply_begin and multiply_wait.

#define WORDS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WORDS_24 WORDS_16 \
    ", %16, %17, %18, %19, %20, %21, %22, %23"
#define WORDS_32 WORDS_16 \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WORDS_36 WORDS_32 ", %32, %33, %34, %35"
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
#define FLOATS_8(F, i)                                                                             \
    F(d[i]), F(d[i + 1]), F(d[i + 2]), F(d[i + 3]), F(d[i + 4]), F(d[i + 5]), F(d[i + 6]),         \
        F(d[i + 7])
#define FLOATS_16(F) FLOATS_8(F, 0), FLOATS_8(F, 8)
#define FLOATS_24(F) FLOATS_16(F), FLOATS_8(F, 16)
#define FLOATS_32(F) FLOATS_24(F), FLOATS_8(F, 24)
#define FLOATS_36(F) FLOATS_32(F), F(d[32]), F(d[33]), F(d[34]), F(d[35])
#define FLOATS_40(F) FLOATS_32(F), FLOATS_8(F, 32)
#define FLOATS_48(F) FLOATS_40(F), FLOATS_8(F, 40)
#define FLOATS_64(F) FLOATS_48(F), FLOATS_8(F, 48), FLOATS_8(F, 56)
#define FLOATS_128(F)                                                                              \
    FLOATS_64(F), FLOATS_8(F, 64), FLOATS_8(F, 72), FLOATS_8(F, 80), FLOATS_8(F, 88),              \
        FLOATS_8(F, 96), FLOATS_8(F, 104), FLOATS_8(F, 112), FLOATS_8(F, 120)

// multiply: d += a b, or d = a b where `add` is 0; multiply_first: d = a b, which leaves the
// registers of the old d to others. A and B say where the operand is M- or N-major. Overloads by
// the number of d's floats: N / 2 for N of 32, 48, 64, 72, 80, 96, 128, 256.
#define OLD_FLOAT "+f"
#define NEW_FLOAT "=f"
#define DEFINE_MULTIPLY(N, COUNT, I0, I1, I2, I3, I4, I5, I6)                                      \
    template <bool A, bool B>                                                                      \
    DEVICE void multiply(float (&d)[COUNT], u64 a, u64 b, int add)                                 \
    {                                                                                              \
        asm volatile("{.reg .pred p; setp.ne.b32 p, %" I2 ", 0; "                                  \
            "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WORDS_##COUNT             \
            "}, %" I0 ", %" I1 ", p, 1, 1, %" I3 ", %" I4 ";}"                                     \
            : FLOATS_##COUNT(OLD_FLOAT)                                                            \
            : "l"(a), "l"(b), "r"(add), "n"((int)A), "n"((int)B));                                 \
    }                                                                                              \
    template <bool A, bool B> DEVICE void multiply_first(float (&d)[COUNT], u64 a, u64 b)          \
    {                                                                                              \
        asm volatile("{.reg .pred p; setp.ne.b32 p, 0, 0; "                                        \
            "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WORDS_##COUNT             \
            "}, %" I0 ", %" I1 ", p, 1, 1, %" I2 ", %" I3 ";}"                                     \
            : FLOATS_##COUNT(NEW_FLOAT) : "l"(a), "l"(b), "n"((int)A), "n"((int)B));               \
    }                                                                                              \
    template <bool B>                                                                              \
    DEVICE void multiply(float (&d)[COUNT], const u32 (&a)[4], u64 b, int add)                     \
    {                                                                                              \
        asm volatile("{.reg .pred p; setp.ne.b32 p, %" I5 ", 0; "                                  \
            "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WORDS_##COUNT             \
            "}, {%" I0 ", %" I1 ", %" I2 ", %" I3 "}, %" I4 ", p, 1, 1, %" I6 ";}"                 \
            : FLOATS_##COUNT(OLD_FLOAT)                                                            \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"((int)B));          \
    }

DEFINE_MULTIPLY(32, 16, "16", "17", "18", "19", "20", "21", "22")
DEFINE_MULTIPLY(48, 24, "24", "25", "26", "27", "28", "29", "30")
DEFINE_MULTIPLY(64, 32, "32", "33", "34", "35", "36", "37", "38")
DEFINE_MULTIPLY(72, 36, "36", "37", "38", "39", "40", "41", "42")
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

DEVICE float4 load_shared(u32 address)
{
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
        : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(address) : "memory");
    return x;
}

DEVICE void store_shared(u32 address, float4 x)
{
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};"
        :: "r"(address), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
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

// ---- 2. packed sequences and softmax, as in kernels.cu ------------------------------------------

// A tile of one sequence's queries, or keys. Queries and keys count within the sequence.
struct SequenceTile
{
    int sequence, first_token, queries, first_key_token, keys;
    int visible; // keys that are not masked for all
    int before;  // keys that stand before the first query's own, where the mask is causal
    int first;   // of the tile
};

// Keys that a query sees.
DEVICE int keys_seen(int causal, const SequenceTile& at, int query)
{
    return causal ? max(0, min(at.visible, query + 1 + at.before)) : at.visible;
}

// Takes row `tile` of the list that AttentionTiles.cs describes; false behind its end.
DEVICE bool take_tile(SequenceTile& at, const int4* tiles, int tile, bool of_keys,
    const int* key_lengths, int causal)
{
    int4 tokens = tiles[2 * tile], place = tiles[2 * tile + 1];
    at.sequence = place.x;
    at.first_token = tokens.x;
    at.queries = tokens.y;
    at.first_key_token = tokens.z;
    at.keys = tokens.w;
    at.first = place.y;
    at.visible = key_lengths ? max(0, min(at.keys, key_lengths[place.x])) : at.keys;
    at.before = (causal == 2 ? at.visible : at.keys) - at.queries;
    return at.first < (of_keys ? at.keys : at.queries);
}

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f
#define MINUS_INFINITY __int_as_float(0xff800000)

// 2^x, a few units in the last place; 0 for -infinity and where floats have few bits left.
DEVICE float exp2_approx(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Starts the copy of a tile of ROWS rows of DIM elements that lie stride elements apart, by a
// warpgroup; rows from `rows` on and columns from DIM to the next multiple of 16 become zeros.
template <int DIM, int ROWS>
DEVICE void copy_tile(u32 tile, const real* from, int stride, int rows)
{
    constexpr int ALL_PIECES = (DIM + 15) / 16 * 2;
    int thread = threadIdx.x % WARPGROUP;
#pragma unroll
    for (int first = 0; first < ALL_PIECES; first += 8)
    {
        const int pieces = ALL_PIECES - first < 8 ? ALL_PIECES - first : 8; // 8, 4 or 2
        int row = thread / pieces, piece = thread % pieces;
        u32 address = tile + first / 8 * ROWS * ROW_BYTES + swizzled(row, piece);
        const real* line = from + row * stride + (first + piece) * 8;
        bool inside = (first + piece) * 8 < DIM;
#pragma unroll
        for (int step = 0; step < ROWS; step += WARPGROUP / pieces)
        {
            copy_async_16(address + step * ROW_BYTES, line, inside && row + step < rows);
            line += WARPGROUP / pieces * stride;
        }
    }
}

// ---- 3. attention, forward ----------------------------------------------------------------------

// o = softmax(scale q k^T + mask) v and lse = ln(sum exp(scale q k^T)); 0 and -infinity for a query
// that sees no key. q and o [tokens, heads, DIM], k and v [key tokens, kv_heads, DIM], lse [tokens,
// heads]. After Shah et al. 2024 (FlashAttention-3).
//
// As many blocks as multiprocessors at most; each takes rows of the list of tiles for a head, the
// list there and back again, so that those with a long tile get short ones later. A tile is 128
// queries: one warpgroup copies, each of the other two multiplies 64 queries by 128 keys (64 where
// DIM is above 128) at a time, from the last key to the first, so that masked tiles come first.
// While the products of one group run, the other has its softmax; within a group the scores of the
// next keys are computed beside the output of these. 4 DIM FLOP per query and key seen, plus what
// the mask cuts from the last tiles; q and o move once, k and v once per tile of queries and head,
// mostly from L2.
template <int DIM> struct Forward
{
    static constexpr int ROWS = ATTENTION_TILE_ROWS, KEYS = DIM > 128 ? 64 : 128, STAGES = 2;
    static constexpr int CHUNKS = (DIM + CHUNK_COLS - 1) / CHUNK_COLS, STEPS = (DIM + 15) / 16;
    static constexpr int ROWS_CHUNK = ROWS * ROW_BYTES, KEYS_CHUNK = KEYS * ROW_BYTES;
    static constexpr int KEY_TILE = CHUNKS * KEYS_CHUNK;
    static constexpr bool OWN_OUTPUT = DIM <= 128; // else the output leaves through the queries'
    static constexpr int QUERY_AT = 0, KEY_AT = CHUNKS * ROWS_CHUNK;
    static constexpr int VALUE_AT = KEY_AT + STAGES * KEY_TILE;
    static constexpr int OUTPUT_AT = OWN_OUTPUT ? VALUE_AT + STAGES * KEY_TILE : QUERY_AT;
    static constexpr int BARRIERS_AT = VALUE_AT + STAGES * KEY_TILE
        + (OWN_OUTPUT ? CHUNKS * ROWS_CHUNK : 0);
    static constexpr int QUERY_FULL = 0, QUERY_EMPTY = 8, KEY_FULL = 16, KEY_EMPTY = 32;
    static constexpr int VALUE_FULL = 48, VALUE_EMPTY = 64;
};

// What a block does next: false where there is nothing.
DEVICE bool next_tile(SequenceTile& at, int& head, int round, const int4* tiles, int rows,
    const int* key_lengths, int heads, int causal)
{
    int blocks = gridDim.x;
    int item = round * blocks + (round % 2 ? blocks - 1 - (int)blockIdx.x : (int)blockIdx.x);
    if (item >= rows * heads) return false;
    head = item % heads;
    return take_tile(at, tiles, item / heads, false, key_lengths, causal);
}

// The copying warpgroup's part.
template <int DIM>
DEVICE void forward_copy(u32 shared, u32 barriers, const real* q, const real* k, const real* v,
    const int4* tiles, int rows, const int* key_lengths, int heads, int kv_heads, int causal)
{
    typedef Forward<DIM> F;
    int stride = heads * DIM, kv_stride = kv_heads * DIM, done = 0, count = 0;
    for (int round = 0; round * (int)gridDim.x < rows * heads; round++)
    {
        SequenceTile at;
        int head;
        if (!next_tile(at, head, round, tiles, rows, key_lengths, heads, causal)) continue;
        int queries = min(F::ROWS, at.queries - at.first);
        int end = keys_seen(causal, at, at.first + queries - 1);
        long long key_at = ((long long)at.first_key_token * kv_heads + head / (heads / kv_heads))
            * DIM;
        barrier_wait(barriers + F::QUERY_EMPTY, (done & 1) ^ 1);
        copy_tile<DIM, F::ROWS>(shared + F::QUERY_AT,
            q + ((long long)(at.first_token + at.first) * heads + head) * DIM, stride, queries);
        barrier_arrive_after_copies(barriers + F::QUERY_FULL);
        done++;
        for (int first = (end + F::KEYS - 1) / F::KEYS * F::KEYS - F::KEYS; first >= 0;
             first -= F::KEYS, count++)
        {
            int stage = count % F::STAGES, parity = count / F::STAGES & 1;
            long long from = key_at + (long long)first * kv_stride;
            barrier_wait(barriers + F::KEY_EMPTY + 8 * stage, parity ^ 1);
            copy_tile<DIM, F::KEYS>(
                shared + F::KEY_AT + stage * F::KEY_TILE, k + from, kv_stride, end - first);
            barrier_arrive_after_copies(barriers + F::KEY_FULL + 8 * stage);
            barrier_wait(barriers + F::VALUE_EMPTY + 8 * stage, parity ^ 1);
            copy_tile<DIM, F::KEYS>(
                shared + F::VALUE_AT + stage * F::KEY_TILE, v + from, kv_stride, end - first);
            barrier_arrive_after_copies(barriers + F::VALUE_FULL + 8 * stage);
        }
    }
}

// Scores of a group's queries with a tile of keys, s = q k^T.
template <int DIM>
DEVICE void score(float (&s)[Forward<DIM>::KEYS / 2], u64 query, u64 key)
{
    typedef Forward<DIM> F;
#pragma unroll
    for (int step = 0; step < F::STEPS; step++)
    {
        u64 a = further(query, step / 4 * F::ROWS_CHUNK + step % 4 * 32);
        u64 b = further(key, step / 4 * F::KEYS_CHUNK + step % 4 * 32);
        if (step == 0) multiply_first<false, false>(s, a, b);
        else multiply<false, false>(s, a, b, 1);
    }
}

// out += p v.
template <int DIM>
DEVICE void weigh(float (&out)[DIM / 2], const u32 (&p)[Forward<DIM>::KEYS / 16][4], u64 value)
{
#pragma unroll
    for (int step = 0; step < Forward<DIM>::KEYS / 16; step++)
        multiply<true>(out, p[step], further(value, step * 16 * ROW_BYTES), 1);
}

// This thread's two rows of a group's running softmax: raw scores' maximum, this thread's share of
// the sum of p = 2^(factor s - offset), offset = factor maximum.
struct Softmax
{
    float max[2], sum[2];
};

// Scores to p, in place; keep gets what earlier sums and outputs shrink by. A NaN and an infinite
// score stay visible: fmaxf drops a NaN, but its own p keeps it, and infinity - infinity is one.
// Maxima and sums go in four strands a row, as few warps are there to hide latency.
template <int N>
DEVICE void soften(float (&s)[N], Softmax& row, float (&keep)[2], float factor)
{
    float top[2], offset[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
    {
        float most[4];
#pragma unroll
        for (int n = 0; n < N / 4; n++)
        {
            float pair = fmaxf(s[4 * n + 2 * i], s[4 * n + 2 * i + 1]);
            most[n % 4] = n < 4 ? pair : fmaxf(most[n % 4], pair);
        }
        top[i] = fmaxf(fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3])), row.max[i]);
    }
#pragma unroll
    for (int step = 1; step < 4; step *= 2)
#pragma unroll
        for (int i = 0; i < 2; i++)
            top[i] = fmaxf(top[i], __shfl_xor_sync(ALL_LANES, top[i], step));
#pragma unroll
    for (int i = 0; i < 2; i++)
    {
        offset[i] = top[i] == MINUS_INFINITY ? 0 : __fmul_rn(top[i], factor);
        keep[i] = exp2_approx(fmaf(row.max[i], factor, -offset[i]));
        row.max[i] = top[i];
    }
    float sum[2][4] = {};
#pragma unroll
    for (int n = 0; n < N; n++)
    {
        int i = n / 2 % 2, strand = n / 8 % 2 * 2 + n % 2;
        s[n] = exp2_approx(fmaf(s[n], factor, -offset[i]));
        sum[i][strand] += s[n];
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
        row.sum[i] = fmaf(row.sum[i], keep[i],
            (sum[i][0] + sum[i][1]) + (sum[i][2] + sum[i][3]));
}

// Masks what a query does not see; key is the key of the thread's first score.
template <int N> DEVICE void mask(float (&s)[N], const int (&seen)[2], int key)
{
#pragma unroll
    for (int n = 0; n < N; n++)
        if (key + n / 4 * 8 + n % 2 >= seen[n / 2 % 2]) s[n] = MINUS_INFINITY;
}

// p as the left operand of the product with v.
template <int N> DEVICE void narrow_tile(u32 (&p)[N / 8][4], const float (&s)[N])
{
#pragma unroll
    for (int n = 0; n < N / 2; n++) p[n / 4][n % 4] = narrow2(s[2 * n], s[2 * n + 1]);
}

// Earlier output shrinks by keep.
template <int N> DEVICE void shrink(float (&out)[N], const float (&keep)[2])
{
#pragma unroll
    for (int n = 0; n < N; n++) out[n] *= keep[n / 2 % 2];
}

// What a multiplying warpgroup has in registers.
template <int DIM> struct ForwardState
{
    float s[Forward<DIM>::KEYS / 2], out[DIM / 2];
    u32 p[Forward<DIM>::KEYS / 16][4];
    Softmax softmax;
    int seen[2]; // keys that the lane's queries see
    int count;   // tiles of keys so far
};

// Scores of tile number `tile` beside the output of the one behind it. While products run there is
// no branch, at which the assembler would wait for them: masked tiles have code of their own.
template <int DIM, bool MASKED>
DEVICE void forward_step(ForwardState<DIM>& x, int tile, bool is_first, u64 query, u64 keys,
    u64 values, u32 barriers, int group, int lane, float factor)
{
    typedef Forward<DIM> F;
    float keep[2];
    int before = x.count % F::STAGES, parity_before = x.count / F::STAGES & 1;
    x.count++;
    int stage = x.count % F::STAGES, parity = x.count / F::STAGES & 1;
    barrier_wait(barriers + F::KEY_FULL + 8 * stage, parity);
    barrier_wait(barriers + F::VALUE_FULL + 8 * before, parity_before);
    async_fence_shared();
    if (group == 1 || !is_first) group_sync(1 + group, 2 * WARPGROUP);
    hold(x.out);
    multiply_begin();
    score<DIM>(x.s, query, further(keys, stage * F::KEY_TILE));
    multiply_commit();
    weigh<DIM>(x.out, x.p, further(values, before * F::KEY_TILE));
    multiply_commit();
    if (group == 0 || tile > 0) group_arrive(2 - group, 2 * WARPGROUP);
    multiply_wait<1>();
    hold(x.s);
    if (lane == 0) barrier_arrive(barriers + F::KEY_EMPTY + 8 * stage);
    if (MASKED) mask(x.s, x.seen, tile * F::KEYS + 2 * (lane % 4));
    soften(x.s, x.softmax, keep, factor);
    // Where none of the warp's maxima rose, earlier output stays. A wait that stood before this
    // branch the assembler would move up to the other, before every p: so it takes them to branch,
    // though no sum is below 0, and each way has a wait.
    if (__any_sync(ALL_LANES, keep[0] != 1 || keep[1] != 1
        || x.softmax.sum[0] + x.softmax.sum[1] < 0))
    {
        multiply_wait<0>();
        hold(x.out);
        shrink(x.out, keep);
    }
    else
    {
        asm volatile("wgmma.wait_group.sync.aligned 0; // the same" ::: "memory");
        hold(x.out);
    }
    if (lane == 0) barrier_arrive(barriers + F::VALUE_EMPTY + 8 * before);
    narrow_tile(x.p, x.s);
}

// The part of each of the two warpgroups that multiply.
template <int DIM>
DEVICE void forward_multiply(u32 shared, char* output, u32 barriers, real* o, float* lse,
    const int4* tiles, int rows, const int* key_lengths, int heads, int causal, float scale)
{
    typedef Forward<DIM> F;
    constexpr int KEYS = F::KEYS, HALF = F::ROWS / 2;
    int group = threadIdx.x / WARPGROUP - 1, warp = threadIdx.x / WARP % 4;
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    float factor = scale * LOG2_E;
    u64 query = matrix_descriptor(
        shared + F::QUERY_AT + group * HALF * ROW_BYTES, 16, 8 * ROW_BYTES);
    u64 keys = matrix_descriptor(shared + F::KEY_AT, 16, 8 * ROW_BYTES);
    u64 values = matrix_descriptor(shared + F::VALUE_AT, F::KEYS_CHUNK, 8 * ROW_BYTES);
    ForwardState<DIM> x;
    x.count = 0;
    int done = 0;
    for (int round = 0; round * (int)gridDim.x < rows * heads; round++)
    {
        SequenceTile at;
        int head;
        if (!next_tile(at, head, round, tiles, rows, key_lengths, heads, causal)) continue;
        int queries = min(F::ROWS, at.queries - at.first);
        int end = keys_seen(causal, at, at.first + queries - 1);
        int row = group * HALF + 16 * warp + g; // and row + 8: this lane's queries in the tile
        // Tiles of keys, and those that all of the group's queries see whole.
        int all = (end + KEYS - 1) / KEYS;
        int open = min(end, keys_seen(causal, at, at.first + group * HALF)) / KEYS;

#pragma unroll
        for (int i = 0; i < DIM / 2; i++) x.out[i] = 0;
#pragma unroll
        for (int i = 0; i < 2; i++)
        {
            x.seen[i] = min(end, keys_seen(causal, at, at.first + row + 8 * i));
            x.softmax.max[i] = MINUS_INFINITY;
            x.softmax.sum[i] = 0;
        }
        barrier_wait(barriers + F::QUERY_FULL, done & 1);
        if (all > 0)
        {
            float keep[2];
            int stage = x.count % F::STAGES, parity = x.count / F::STAGES & 1;
            barrier_wait(barriers + F::KEY_FULL + 8 * stage, parity);
            async_fence_shared();
            multiply_begin();
            score<DIM>(x.s, query, further(keys, stage * F::KEY_TILE));
            multiply_commit();
            multiply_wait<0>();
            hold(x.s);
            if (lane == 0) barrier_arrive(barriers + F::KEY_EMPTY + 8 * stage);
            if (open < all) mask(x.s, x.seen, (all - 1) * KEYS + 2 * t);
            soften(x.s, x.softmax, keep, factor);
            narrow_tile(x.p, x.s);
            int tile = all - 2;
            for (; tile >= max(0, open); tile--)
                forward_step<DIM, true>(x, tile, tile == all - 2, query, keys, values, barriers,
                    group, lane, factor);
            for (; tile >= 0; tile--)
                forward_step<DIM, false>(x, tile, tile == all - 2, query, keys, values, barriers,
                    group, lane, factor);

            stage = x.count % F::STAGES;
            parity = x.count / F::STAGES & 1;
            if (F::OWN_OUTPUT && lane == 0) barrier_arrive(barriers + F::QUERY_EMPTY);
            barrier_wait(barriers + F::VALUE_FULL + 8 * stage, parity);
            async_fence_shared();
            hold(x.out);
            multiply_begin();
            weigh<DIM>(x.out, x.p, further(values, stage * F::KEY_TILE));
            multiply_commit();
            multiply_wait<0>();
            hold(x.out);
            if (lane == 0) barrier_arrive(barriers + F::VALUE_EMPTY + 8 * stage);
            x.count++;
        }
        else if (F::OWN_OUTPUT && lane == 0)
        {
            barrier_arrive(barriers + F::QUERY_EMPTY);
        }
        done++;

        // Through shared memory, the warp's own rows, to stores of 16 bytes.
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; i++)
        {
            float sum = x.softmax.sum[i];
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            float inverse = 1 / sum, top = x.softmax.max[i];
            int r = row + 8 * i;
            if (t == 0 && r < queries)
            {
                // The rounding of the offset is taken back, since it is large where scores are.
                float rounding = fmaf(top, factor, -__fmul_rn(top, factor));
                lse[(long long)(at.first_token + at.first + r) * heads + head] = sum == 0
                    ? MINUS_INFINITY : fmaf(top, scale, logf(sum) - rounding * LN_2);
            }
#pragma unroll
            for (int n = 0; n < DIM / 8; n++)
            {
                u32* pair = (u32*)(output + n / 8 * F::ROWS_CHUNK + swizzled(r, n % 8)) + t;
                // Where all scores are -infinity, 0 / 0.
                *pair = x.seen[i] == 0
                    ? 0 : narrow2(x.out[4 * n + 2 * i] * inverse, x.out[4 * n + 2 * i + 1] * inverse);
            }
        }
        __syncwarp();
        for (int i = lane; i < 16 * (DIM / 8); i += WARP)
        {
            int r = group * HALF + 16 * warp + i / (DIM / 8), n = i % (DIM / 8);
            if (r < queries)
                *(uint4*)(o + ((long long)(at.first_token + at.first + r) * heads + head) * DIM
                    + 8 * n) = *(const uint4*)(output + n / 8 * F::ROWS_CHUNK + swizzled(r, n % 8));
        }
        __syncwarp();
        if (!F::OWN_OUTPUT && lane == 0) barrier_arrive(barriers + F::QUERY_EMPTY);
    }
}

template <int DIM>
DEVICE void attention_forward(real* o, float* lse, const real* q, const real* k, const real* v,
    const int4* tiles, const int* key_lengths, int rows, int heads, int kv_heads, int causal,
    float scale)
{
    typedef Forward<DIM> F;
    extern __shared__ uint4 forward_shared[];
    u32 shared = (shared_address(forward_shared) + 1023) / 1024 * 1024;
    char* output = (char*)forward_shared + (shared - shared_address(forward_shared))
        + F::OUTPUT_AT;
    u32 barriers = shared + F::BARRIERS_AT;
    if (threadIdx.x == 0)
    {
        constexpr int WARPS = 8; // that multiply
        barrier_init(barriers + F::QUERY_FULL, WARPGROUP);
        barrier_init(barriers + F::QUERY_EMPTY, WARPS);
        for (int stage = 0; stage < F::STAGES; stage++)
        {
            barrier_init(barriers + F::KEY_FULL + 8 * stage, WARPGROUP);
            barrier_init(barriers + F::KEY_EMPTY + 8 * stage, WARPS);
            barrier_init(barriers + F::VALUE_FULL + 8 * stage, WARPGROUP);
            barrier_init(barriers + F::VALUE_EMPTY + 8 * stage, WARPS);
        }
        barrier_init_done();
    }
    __syncthreads();
    if (threadIdx.x < WARPGROUP)
    {
        keep_registers<40>();
        forward_copy<DIM>(
            shared, barriers, q, k, v, tiles, rows, key_lengths, heads, kv_heads, causal);
    }
    else
    {
        take_registers<232>();
        forward_multiply<DIM>(shared, output, barriers, o, lse, tiles, rows, key_lengths, heads,
            causal, scale);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_forward_hopper_64(
    real* o, float* lse, const real* q, const real* k, const real* v, const int* tiles,
    const int* key_lengths, int rows, int heads, int kv_heads, int causal, float scale)
{
    attention_forward<64>(o, lse, q, k, v, (const int4*)tiles, key_lengths, rows, heads, kv_heads,
        causal, scale);
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_forward_hopper_72(
    real* o, float* lse, const real* q, const real* k, const real* v, const int* tiles,
    const int* key_lengths, int rows, int heads, int kv_heads, int causal, float scale)
{
    attention_forward<72>(o, lse, q, k, v, (const int4*)tiles, key_lengths, rows, heads, kv_heads,
        causal, scale);
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_forward_hopper_80(
    real* o, float* lse, const real* q, const real* k, const real* v, const int* tiles,
    const int* key_lengths, int rows, int heads, int kv_heads, int causal, float scale)
{
    attention_forward<80>(o, lse, q, k, v, (const int4*)tiles, key_lengths, rows, heads, kv_heads,
        causal, scale);
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_forward_hopper_96(
    real* o, float* lse, const real* q, const real* k, const real* v, const int* tiles,
    const int* key_lengths, int rows, int heads, int kv_heads, int causal, float scale)
{
    attention_forward<96>(o, lse, q, k, v, (const int4*)tiles, key_lengths, rows, heads, kv_heads,
        causal, scale);
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_forward_hopper_128(
    real* o, float* lse, const real* q, const real* k, const real* v, const int* tiles,
    const int* key_lengths, int rows, int heads, int kv_heads, int causal, float scale)
{
    attention_forward<128>(o, lse, q, k, v, (const int4*)tiles, key_lengths, rows, heads, kv_heads,
        causal, scale);
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_forward_hopper_256(
    real* o, float* lse, const real* q, const real* k, const real* v, const int* tiles,
    const int* key_lengths, int rows, int heads, int kv_heads, int causal, float scale)
{
    attention_forward<256>(o, lse, q, k, v, (const int4*)tiles, key_lengths, rows, heads, kv_heads,
        causal, scale);
}

// ---- 4. attention, backward ---------------------------------------------------------------------
//
// With p = exp(scale q.k - lse), dp = dO.v and ds = p (dp - delta):
//   dv = sum p dO,  dk = scale sum ds q  over the queries that see a key,
//   dq = scale sum ds k  over the keys that a query sees: five products of 2 DIM FLOP per pair.
// A block has 128 keys and one query head and goes over the tiles of queries that see them, from
// the last to the first. Its two multiplying warpgroups have 64 keys each; they compute scores
// transposed, keys by queries, so that p and ds feed dv and dk from registers; ds goes through
// shared memory for dq, of which each has half. dk and dv stay in registers to the end (floats, one
// part per query head where heads share a key head). dq of a tile is a sum over blocks: floats in
// global memory, to which the blocks add in the order of their keys, each when `turns` of the tile
// and head says that it is its turn: the same sums in the same order in every run. A block waits
// only for blocks with smaller numbers, which the device starts first, so that none waits for ever;
// as all begin with the last queries, a block is a step behind the one before it and seldom waits.
// attention_backward_finish sums the parts and rounds.
//
// Accumulators that wait for that are kept as they lay in registers, "fragments": 64 rows of DIM
// (rounded up to 16), as [DIM / 8][128 threads] x 4 floats; see multiply.

// exp(scale product - lse). The difference is rounded once,
// so that large logits keep their precision.
DEVICE float probability(float product, float scale, float lse)
{
    return exp2_approx(fmaf(product, scale, -lse) * LOG2_E);
}

// A place for each tile of packed sequences: tiles of different sequences never share one, and
// tokens / rows + sequences of them are enough.
DEVICE int place_of_tile(int first_token, int sequence, int first, int rows)
{
    return first_token / rows + sequence + first / rows;
}

#ifndef AHEAD
#define AHEAD 1
#endif

// Columns of a head's tiles, the last of them zeros where the head has fewer.
#define BACKWARD_COLS(DIM) (((DIM) + 15) / 16 * 16)

// Tiles of a head dimension in shared memory: chunks of 64 columns, or of 16 where 64 do not fit.
template <int DIM> struct Backward
{
    static constexpr int COLS = BACKWARD_COLS(DIM);
    static constexpr int CHUNK = COLS % 64 == 0 ? 64 : 16, ROW = CHUNK * 2;
    static constexpr int SWIZZLE = CHUNK == 64 ? SWIZZLE_128 : SWIZZLE_32;
    static constexpr int KEYS = ATTENTION_TILE_ROWS, QUERIES = 64;
    // Columns of dq that a warpgroup has, the first or the last; of 80, both have the middle 16.
    static constexpr int DQ_COLS = (COLS + 31) / 32 * 16, DQ_SECOND = COLS - DQ_COLS;
    static constexpr int KEY_BYTES = KEYS * COLS * 2, QUERY_BYTES = QUERIES * COLS * 2;
    static constexpr int DS_BYTES = KEYS * QUERIES * 2, DQ_BYTES = QUERIES * COLS * 4;
    static constexpr int STATISTICS_BYTES = QUERIES * 8;
    // Places in shared memory.
    static constexpr int K = 0, V = K + KEY_BYTES, Q = V + KEY_BYTES, DO = Q + 2 * QUERY_BYTES;
    static constexpr int DS = DO + 2 * QUERY_BYTES, DQ = DS + 2 * DS_BYTES;
    static constexpr int STATISTICS = DQ + DQ_BYTES;
    static constexpr int BARRIERS = STATISTICS + 2 * STATISTICS_BYTES;
    static constexpr int BLOCK = BARRIERS + 128, BYTES = BLOCK + 128;

    // Of an operand with `rows` rows: K-major from columns 16 i, or N-major from rows 16 i.
    DEVICE u64 by_rows(u32 tile) { return matrix_descriptor(tile, 16, 8 * ROW, SWIZZLE); }
    DEVICE u64 by_cols(u32 tile, int rows)
    {
        return matrix_descriptor(tile, rows * ROW, 8 * ROW, SWIZZLE);
    }
    DEVICE int col_step(int i, int rows)
    {
        return i * 16 / CHUNK * rows * ROW + i * 16 % CHUNK * 2;
    }
    DEVICE int row_step(int i) { return i * 16 * ROW; }
};

// What the three kinds of warps of a block know of its work: in shared memory, since those that
// copy have few registers.
struct BackwardBlock
{
    const real *q, *d_output, *k, *v; // first query or key of the sequence and head, tile of keys
    const float2* statistics;
    float* dq; // of the sequence's first tile and head; tiles follow one another
    int* turns;
    int stride, key_stride; // elements from a token to the next
    int queries, keys;      // rows left from the pointers
    int first_tile, steps;  // tiles of queries: the first one that sees the keys, and how many
    int turn;
};

// A warp's copy of ROWS rows of DIM elements into a tile; rows from `rows` on and columns from DIM
// on become zeros.
template <int DIM, int ROWS>
DEVICE void copy_rows(u32 tile, const real* from, int stride, int rows)
{
    typedef Backward<DIM> S;
    constexpr int PIECES = S::CHUNK / 8, ROWS_AT_ONCE = WARP / PIECES;
    int row = threadIdx.x % WARP / PIECES, piece = threadIdx.x % PIECES;
    u32 to = tile + (PIECES == 8 ? swizzled(row, piece) : swizzled_narrow(row, piece));
    const real* line = from + row * stride + piece * 8;
#pragma unroll 1
    for (int i = 0; i < ROWS; i += ROWS_AT_ONCE)
    {
        u32 at = (PIECES == 8 ? to ^ (i & 4) * 16 : to) + i * S::ROW;
#pragma unroll
        for (int c = 0; c < S::COLS; c += S::CHUNK)
            copy_async_16(at + c * ROWS * 2, line + c, row + i < rows && c + piece * 8 < DIM);
        line += ROWS_AT_ONCE * stride;
    }
}

// Phases of a ring of two stages: the parity of the wait for step `step` to be filled; a filler
// waits with the opposite.
DEVICE int ring_parity(int step) { return step >> 1 & 1; }

// The barriers of a block, by number; those of rings have one per stage.
#define Q_FULL 0
#define Q_EMPTY 2
#define DO_FULL 4
#define DO_EMPTY 6
#define DQ_FULL 8
#define DQ_EMPTY 9
#define CONSUMER_WARPS 8

// One warp brings K and the tiles of q with (lse, delta), another V and the tiles of dO.
template <int DIM> DEVICE void backward_load(const BackwardBlock& b, u32 memory, bool of_q)
{
    typedef Backward<DIM> S;
    u32 tiles = memory + (of_q ? S::Q : S::DO), lane = threadIdx.x % WARP;
    u32 full = memory + S::BARRIERS + (of_q ? Q_FULL : DO_FULL) * 8;
    copy_rows<DIM, S::KEYS>(
        memory + (of_q ? S::K : S::V), of_q ? b.k : b.v, b.key_stride, b.keys);
    int first = (b.first_tile + b.steps - 1) * S::QUERIES;
    const real* from = (of_q ? b.q : b.d_output) + (u64)first * b.stride;
    for (int step = 0; step < b.steps; step++)
    {
        int stage = step & 1;
        barrier_wait(full + (Q_EMPTY - Q_FULL + stage) * 8, ring_parity(step) ^ 1);
        copy_rows<DIM, S::QUERIES>(
            tiles + stage * S::QUERY_BYTES, from, b.stride, b.queries - first);
        if (of_q)
        {
#pragma unroll
            for (int i = 0; i < S::QUERIES; i += WARP)
                copy_async_8(memory + S::STATISTICS + stage * S::STATISTICS_BYTES + (lane + i) * 8,
                    b.statistics + first + lane + i, first + (int)lane + i < b.queries);
        }
        barrier_arrive_after_copies(full + stage * 8);
        first -= S::QUERIES;
        from -= S::QUERIES * b.stride;
    }
}

// One thread adds the tiles of dq to global memory, each when its turn has come.
template <int DIM> DEVICE void backward_add_dq(const BackwardBlock& b, u32 memory)
{
    typedef Backward<DIM> S;
    u32 full = memory + S::BARRIERS + DQ_FULL * 8, empty = memory + S::BARRIERS + DQ_EMPTY * 8;
    for (int step = 0; step < b.steps; step++)
    {
        int tile = b.first_tile + b.steps - 1 - step;
        float* to = b.dq + (u64)tile * (S::DQ_BYTES / 4);
        barrier_wait(full, step & 1);
        if (b.turn == 0) bulk_store(to, memory + S::DQ, S::DQ_BYTES);
        else
        {
            while (load_acquire(b.turns + tile) != b.turn) {}
            async_fence();
            bulk_add_floats(to, memory + S::DQ, S::DQ_BYTES);
        }
        bulk_commit();
        bulk_wait_read();
        barrier_arrive(empty);
        bulk_wait();
        async_fence();
        store_release(b.turns + tile, b.turn + 1);
    }
}

// d[64, all], a fragment, to memory at fragments.
template <int N> DEVICE void store_fragment(float* to, const float (&d)[N])
{
    float4* at = (float4*)to + threadIdx.x % WARPGROUP;
#pragma unroll
    for (int n = 0; n < N / 4; n++)
        at[n * WARPGROUP] = make_float4(d[4 * n], d[4 * n + 1], d[4 * n + 2], d[4 * n + 3]);
}

// 64 rows of a gradient from a fragment, rounded; rows that exist.
template <int DIM, int N>
DEVICE void store_gradient(
    real* to, int stride, int rows, const float (&d)[N], float scale, int accumulate)
{
    int lane = threadIdx.x % WARP, g = threadIdx.x % WARPGROUP / WARP * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++)
    {
        if (g + half * 8 >= rows) continue;
        u32* words = (u32*)(to + (u64)(g + half * 8) * stride) + lane % 4;
#pragma unroll
        for (int n = 0; n < DIM / 8; n++)
        {
            float low = scale * d[4 * n + half * 2], high = scale * d[4 * n + half * 2 + 1];
            if (accumulate)
            {
                u32 before = words[n * 4];
                low += widen((real)before);
                high += widen((real)(before >> 16));
            }
            words[n * 4] = narrow2(low, high);
        }
    }
}

// Where a multiplying warpgroup leaves its dk and dv.
struct BackwardResult
{
    real *dk, *dv;              // its first key, or null
    float *dk_parts, *dv_parts; // its fragment, or null
    int rows;                   // keys from there
    int accumulate_k, accumulate_v;
    float scale;
};

// Starts d = a b^T for a tile of 64 queries, of which b has the rows, in the stage of `step`.
template <int DIM>
DEVICE void backward_scores(float (&d)[32], u64 a, u64 b, u32 full, int step)
{
    typedef Backward<DIM> S;
    int stage = step & 1;
    barrier_wait(full + stage * 8, ring_parity(step));
    async_fence_shared();
    b = further(b, stage * S::QUERY_BYTES);
    multiply_begin();
#pragma unroll
    for (int i = 0; i < S::COLS / 16; i++)
    {
        u64 left = further(a, S::col_step(i, S::KEYS));
        u64 right = further(b, S::col_step(i, S::QUERIES));
        if (i == 0) multiply_first<false, false>(d, left, right);
        else multiply<false, false>(d, left, right, 1);
    }
    multiply_commit();
}

// Scores to p, in place and rounded; statistics lie at 16 bytes for each two queries. A masked tile
// begins with query `first`, and `low` is the first query that sees each of the lane's two keys.
template <bool MASKED>
DEVICE void backward_probabilities(float (&s)[32], u32 (&p)[4][4], u32 statistics, float scale,
    int first, const int (&low)[2])
{
#pragma unroll
    for (int n = 0; n < 8; n++)
    {
        float4 two = load_shared(statistics + n * 64);
#pragma unroll
        for (int i = 0; i < 4; i++)
        {
            float x = probability(s[4 * n + i], scale, i % 2 ? two.z : two.x);
            int query = first + n * 8 + threadIdx.x % 4 * 2 + i % 2;
            s[4 * n + i] = MASKED && query < low[i / 2] ? 0 : x;
        }
        p[n / 2][n % 2 * 2] = narrow2(s[4 * n], s[4 * n + 1]);
        p[n / 2][n % 2 * 2 + 1] = narrow2(s[4 * n + 2], s[4 * n + 3]);
    }
}

template <int DIM>
DEVICE void backward_multiply(const BackwardBlock& b, const BackwardResult& result, u32 memory,
    const SequenceTile& at, int causal)
{
    typedef Backward<DIM> S;
    constexpr int COLS = S::COLS, QUERIES = S::QUERIES, FLOATS = QUERIES / 2;
    int group = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP;
    int lane = thread % WARP, warp_key = group * 64 + thread / WARP * 16;
    u32 barriers = memory + S::BARRIERS;
    int steps = b.steps, first_tile = b.first_tile;

    // Where each warpgroup's operands begin; the stages of q and dO and of ds lie further on.
    constexpr int KEY_ROWS = 64 * S::ROW;
    u64 k_rows = S::by_rows(memory + S::K + group * KEY_ROWS);
    u64 v_rows = S::by_rows(memory + S::V + group * KEY_ROWS);
    u64 k_cols = further(
        S::by_cols(memory + S::K, S::KEYS), group * S::col_step(S::DQ_SECOND / 16, S::KEYS));
    u64 q_rows = S::by_rows(memory + S::Q), q_cols = S::by_cols(memory + S::Q, QUERIES);
    u64 do_rows = S::by_rows(memory + S::DO), do_cols = S::by_cols(memory + S::DO, QUERIES);
    u64 ds_cols = matrix_descriptor(memory + S::DS, 16, 8 * ROW_BYTES);
    // A lane's row of the matrices of ds that store_matrix_x4 writes, and which half of 16 queries.
    int ds_row = warp_key + lane / 8 % 2 * 8 + lane % 8, ds_piece = lane / 16;

    // The first query that sees each of a lane's two keys.
    int low[2];
#pragma unroll
    for (int half = 0; half < 2; half++)
    {
        int key = at.first + warp_key + lane / 4 + half * 8;
        low[half] = key >= at.visible ? 0x7fffffff : causal ? key - at.before : -0x7fffffff;
    }
    // From this query on all of the tile's keys are seen.
    int unmasked = at.first + S::KEYS > at.visible ? 0x7fffffff
        : causal ? at.first + S::KEYS - 1 - at.before : -0x7fffffff;

    float dk[COLS / 2], dv[COLS / 2], s[FLOATS], dp[FLOATS];
#pragma unroll
    for (int i = 0; i < COLS / 2; i++) dk[i] = dv[i] = 0;

    if (AHEAD && steps > 0)
    {
        backward_scores<DIM>(s, k_rows, q_rows, barriers + Q_FULL * 8, 0);
        multiply_wait<0>();
        hold(s);
    }
    for (int step = 0; step < steps; step++)
    {
        int stage = step & 1, first = (first_tile + steps - 1 - step) * QUERIES;
        if (!AHEAD) backward_scores<DIM>(s, k_rows, q_rows, barriers + Q_FULL * 8, step);
        backward_scores<DIM>(dp, v_rows, do_rows, barriers + DO_FULL * 8, step);
        if (!AHEAD)
        {
            multiply_wait<1>(); // scores, and dk of the step before
            hold(s);
            hold(dk);
            if (step > 0 && lane == 0) barrier_arrive(barriers + (Q_EMPTY + (stage ^ 1)) * 8);
        }

        // (lse, delta) of queries 8n + 2t and the next one.
        u32 statistics = memory + S::STATISTICS + stage * S::STATISTICS_BYTES + lane % 4 * 16;
        u32 p[QUERIES / 16][4], ds[QUERIES / 16][4];
        if (first < unmasked)
            backward_probabilities<true>(s, p, statistics, result.scale, first, low);
        else backward_probabilities<false>(s, p, statistics, result.scale, first, low);

        u64 do_of = further(do_cols, stage * S::QUERY_BYTES);
        hold(dv);
        multiply_begin();
#pragma unroll
        for (int i = 0; i < QUERIES / 16; i++)
            multiply<true>(dv, p[i], further(do_of, S::row_step(i)), 1);
        multiply_commit();
        multiply_wait<1>(); // dp
        hold(dp);

#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++)
        {
            float4 two = load_shared(statistics + n * 64);
#pragma unroll
            for (int i = 0; i < 4; i++)
            {
                float x = s[4 * n + i] * (dp[4 * n + i] - (i % 2 ? two.w : two.y));
                dp[4 * n + i] = x;
            }
            ds[n / 2][n % 2 * 2] = narrow2(dp[4 * n], dp[4 * n + 1]);
            ds[n / 2][n % 2 * 2 + 1] = narrow2(dp[4 * n + 2], dp[4 * n + 3]);
        }
        u32 ds_tile = memory + S::DS + stage * S::DS_BYTES;
#pragma unroll
        for (int i = 0; i < QUERIES / 16; i++)
            store_matrix_x4(ds_tile + swizzled(ds_row, i * 2 + ds_piece), ds[i]);
        async_fence_shared();
        group_sync(1, 2 * WARPGROUP); // ds of both is there; two stages, so that nobody reads these

        multiply_wait<0>(); // dv
        hold(dv);
        if (lane == 0) barrier_arrive(barriers + (DO_EMPTY + stage) * 8);
        float dq[S::DQ_COLS / 2];
        hold(dk);
        multiply_begin();
        u64 ds_of = further(ds_cols, stage * S::DS_BYTES);
#pragma unroll
        for (int i = 0; i < S::KEYS / 16; i++)
        {
            u64 left = further(ds_of, i * 16 * ROW_BYTES);
            u64 right = further(k_cols, S::row_step(i));
            if (i == 0) multiply_first<true, true>(dq, left, right);
            else multiply<true, true>(dq, left, right, 1);
        }
        multiply_commit();
        u64 q_of = further(q_cols, stage * S::QUERY_BYTES);
#pragma unroll
        for (int i = 0; i < QUERIES / 16; i++)
            multiply<true>(dk, ds[i], further(q_of, S::row_step(i)), 1);
        multiply_commit();
        if (AHEAD) // after the last step for nothing
            backward_scores<DIM>(
                s, k_rows, q_rows, barriers + Q_FULL * 8, min(step + 1, steps - 1));
        multiply_wait<AHEAD ? 2 : 1>(); // dq
        hold(dq);

        barrier_wait(barriers + DQ_EMPTY * 8, step & 1 ^ 1);
        u32 dq_tile = memory + S::DQ + (group * S::DQ_SECOND / 8 * WARPGROUP + thread) * 16;
#pragma unroll
        for (int n = 0; n < S::DQ_COLS / 8; n++)
        {
            if (group == 1 && n < (S::DQ_COLS - S::DQ_SECOND) / 8) continue;
            store_shared(dq_tile + n * WARPGROUP * 16,
                make_float4(dq[4 * n], dq[4 * n + 1], dq[4 * n + 2], dq[4 * n + 3]));
        }
        async_fence_shared();
        barrier_arrive(barriers + DQ_FULL * 8);
        if (AHEAD)
        {
            multiply_wait<0>();
            hold(s);
            hold(dk);
            if (lane == 0) barrier_arrive(barriers + (Q_EMPTY + stage) * 8);
        }
    }
    multiply_wait<0>();
    hold(dk);
    hold(dv);
    if (result.dk_parts) store_fragment(result.dk_parts, dk);
    else if (result.dk)
        store_gradient<DIM>(
            result.dk, b.key_stride, result.rows, dk, result.scale, result.accumulate_k);
    if (result.dv_parts) store_fragment(result.dv_parts, dv);
    else if (result.dv)
        store_gradient<DIM>(result.dv, b.key_stride, result.rows, dv, 1, result.accumulate_v);
}

template <int DIM>
DEVICE void attention_backward(real* dk, real* dv, float* dq, float* dk_parts,
    float* dv_parts, int* turns, const real* q, const real* k, const real* v, const real* d_output,
    const float* statistics, const int4* list, const int* key_lengths, int rows, int sequences,
    int tokens, int key_tokens, int causal, int heads, int kv_heads, float scale, int accumulate_k,
    int accumulate_v, int neighbours)
{
    typedef Backward<DIM> S;
    alignas(1024) extern __shared__ uint4 shared[];
    u32 memory = shared_address(shared);
    // `neighbours` heads at a time; of these the first tile of each, then the second of each.
    int first_head = blockIdx.x / (rows * neighbours) * neighbours;
    int rest = blockIdx.x - first_head * rows, together = min(neighbours, heads - first_head);
    int head = first_head + rest % together, kv_head = head / (heads / kv_heads);
    SequenceTile at;
    if (!take_tile(at, list, rest / together, true, key_lengths, causal)) return;

    u32 barriers = memory + S::BARRIERS;
    BackwardBlock& b = *(BackwardBlock*)((char*)shared + S::BLOCK);
    u64 key = at.first_key_token + at.first;
    if (threadIdx.x == 0)
    {
        int first_query = causal ? max(0, at.first - at.before) : 0;
        u64 token = at.first_token;
        b.stride = heads * DIM;
        b.key_stride = kv_heads * DIM;
        b.q = q + token * b.stride + head * DIM;
        b.d_output = d_output + token * b.stride + head * DIM;
        b.k = k + key * b.key_stride + kv_head * DIM;
        b.v = v + key * b.key_stride + kv_head * DIM;
        b.statistics = (const float2*)statistics + (u64)head * tokens + token;
        b.queries = at.queries;
        b.keys = at.visible - at.first;
        b.first_tile = first_query / S::QUERIES;
        b.steps = b.keys <= 0 ? 0
            : max(0, (at.queries + S::QUERIES - 1) / S::QUERIES - b.first_tile);
        b.turn = at.first / S::KEYS;
        u64 place = (u64)head * (tokens / S::QUERIES + sequences)
            + place_of_tile(at.first_token, at.sequence, 0, S::QUERIES);
        b.dq = dq + place * (S::DQ_BYTES / 4);
        b.turns = turns + place;
#pragma unroll
        for (int stage = 0; stage < 2; stage++)
        {
            barrier_init(barriers + (Q_FULL + stage) * 8, WARP);
            barrier_init(barriers + (DO_FULL + stage) * 8, WARP);
            barrier_init(barriers + (Q_EMPTY + stage) * 8, CONSUMER_WARPS);
            barrier_init(barriers + (DO_EMPTY + stage) * 8, CONSUMER_WARPS);
        }
        barrier_init(barriers + DQ_FULL * 8, 2 * WARPGROUP);
        barrier_init(barriers + DQ_EMPTY * 8, 1);
        barrier_init_done();
    }
    __syncthreads();

    if (threadIdx.x < WARPGROUP)
    {
        keep_registers<24>();
        int warp = threadIdx.x / WARP;
        if (b.steps == 0) return;
        if (warp < 2) backward_load<DIM>(b, memory, warp == 0);
        else if (warp == 2 && threadIdx.x % WARP == 0) backward_add_dq<DIM>(b, memory);
    }
    else
    {
        take_registers<240>();
        int half = threadIdx.x / WARPGROUP - 1;
        u64 own = (key + half * 64) * b.key_stride + kv_head * DIM;
        u64 part = ((u64)head * (key_tokens / S::KEYS + sequences)
            + place_of_tile(at.first_key_token, at.sequence, at.first, S::KEYS)) * 2 + half;
        part *= 64 * S::COLS;
        BackwardResult result = {dk ? dk + own : 0, dv ? dv + own : 0,
            dk_parts ? dk_parts + part : 0, dv_parts ? dv_parts + part : 0,
            at.keys - at.first - half * 64, accumulate_k, accumulate_v, scale};
        backward_multiply<DIM>(b, result, memory, at, causal);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_backward_hopper_64(
    real* dk, real* dv, float* dq, float* dk_parts, float* dv_parts, int* turns, const real* q,
    const real* k, const real* v, const real* output_gradient, const float* statistics,
    const int* tiles, const int* key_lengths, int rows, int sequences, int tokens, int key_tokens,
    int causal, int heads, int kv_heads, float scale, int accumulate_k, int accumulate_v,
    int neighbours)
{
    attention_backward<64>(dk, dv, dq, dk_parts, dv_parts, turns, q, k, v, output_gradient,
        statistics, (const int4*)tiles, key_lengths, rows, sequences, tokens, key_tokens, causal,
        heads, kv_heads, scale, accumulate_k, accumulate_v, neighbours);
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_backward_hopper_72(
    real* dk, real* dv, float* dq, float* dk_parts, float* dv_parts, int* turns, const real* q,
    const real* k, const real* v, const real* output_gradient, const float* statistics,
    const int* tiles, const int* key_lengths, int rows, int sequences, int tokens, int key_tokens,
    int causal, int heads, int kv_heads, float scale, int accumulate_k, int accumulate_v,
    int neighbours)
{
    attention_backward<72>(dk, dv, dq, dk_parts, dv_parts, turns, q, k, v, output_gradient,
        statistics, (const int4*)tiles, key_lengths, rows, sequences, tokens, key_tokens, causal,
        heads, kv_heads, scale, accumulate_k, accumulate_v, neighbours);
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_backward_hopper_80(
    real* dk, real* dv, float* dq, float* dk_parts, float* dv_parts, int* turns, const real* q,
    const real* k, const real* v, const real* output_gradient, const float* statistics,
    const int* tiles, const int* key_lengths, int rows, int sequences, int tokens, int key_tokens,
    int causal, int heads, int kv_heads, float scale, int accumulate_k, int accumulate_v,
    int neighbours)
{
    attention_backward<80>(dk, dv, dq, dk_parts, dv_parts, turns, q, k, v, output_gradient,
        statistics, (const int4*)tiles, key_lengths, rows, sequences, tokens, key_tokens, causal,
        heads, kv_heads, scale, accumulate_k, accumulate_v, neighbours);
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_backward_hopper_96(
    real* dk, real* dv, float* dq, float* dk_parts, float* dv_parts, int* turns, const real* q,
    const real* k, const real* v, const real* output_gradient, const float* statistics,
    const int* tiles, const int* key_lengths, int rows, int sequences, int tokens, int key_tokens,
    int causal, int heads, int kv_heads, float scale, int accumulate_k, int accumulate_v,
    int neighbours)
{
    attention_backward<96>(dk, dv, dq, dk_parts, dv_parts, turns, q, k, v, output_gradient,
        statistics, (const int4*)tiles, key_lengths, rows, sequences, tokens, key_tokens, causal,
        heads, kv_heads, scale, accumulate_k, accumulate_v, neighbours);
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_backward_hopper_128(
    real* dk, real* dv, float* dq, float* dk_parts, float* dv_parts, int* turns, const real* q,
    const real* k, const real* v, const real* output_gradient, const float* statistics,
    const int* tiles, const int* key_lengths, int rows, int sequences, int tokens, int key_tokens,
    int causal, int heads, int kv_heads, float scale, int accumulate_k, int accumulate_v,
    int neighbours)
{
    attention_backward<128>(dk, dv, dq, dk_parts, dv_parts, turns, q, k, v, output_gradient,
        statistics, (const int4*)tiles, key_lengths, rows, sequences, tokens, key_tokens, causal,
        heads, kv_heads, scale, accumulate_k, accumulate_v, neighbours);
}

// dq[tokens, heads, head_dim], dk and dv [key tokens, kv_heads, head_dim] from fragments, rounded,
// or added to what is there: dq of queries that no block added to, whose fragments are undefined,
// is 0; dk and dv are sums of the parts of a key head's query heads, in their order. What is null
// is not wanted. A block of 128 threads per 64 rows, 32 columns, and head of dq, dk, dv (grid y).
// Reads 4 bytes per part and writes 2 per element.
extern "C" __global__ void __launch_bounds__(128) attention_backward_hopper_finish(
    real* dq, real* dk, real* dv, const float* dq_parts, const float* dk_parts,
    const float* dv_parts, const int* turns, const int* query_tiles, const int* key_tiles,
    int query_rows, int key_rows, int sequences, int tokens, int key_tokens, int heads,
    int kv_heads, int head_dim, float scale, int accumulate_q, int accumulate_k, int accumulate_v)
{
    constexpr int KEYS = ATTENTION_TILE_ROWS, QUERIES = 64;
    bool of_keys = (int)blockIdx.y >= heads, of_values = (int)blockIdx.y >= heads + kv_heads;
    int head = blockIdx.y - (of_values ? heads + kv_heads : of_keys ? heads : 0);
    real* to = of_values ? dv : of_keys ? dk : dq;
    const float* fragments = of_values ? dv_parts : of_keys ? dk_parts : dq_parts;
    int accumulate = of_values ? accumulate_v : of_keys ? accumulate_k : accumulate_q;
    int parts = of_keys ? heads / kv_heads : 1, to_heads = of_keys ? kv_heads : heads;
    if (of_values) scale = 1;
    int tile = blockIdx.x / 2, half = blockIdx.x % 2, lane = threadIdx.x % WARP;
    SequenceTile at;
    if (!to || tile >= (of_keys ? key_rows : query_rows)
        || !take_tile(at, (const int4*)(of_keys ? key_tiles : query_tiles), tile, of_keys, 0, 0))
        return;
    int first_row = at.first + half * 64, row = first_row + threadIdx.x / WARP * 16 + lane / 4;
    int token = of_keys ? at.first_key_token : at.first_token;
    int rows = of_keys ? at.keys : at.queries, tile_rows = of_keys ? KEYS : QUERIES;
    if (first_row >= rows) return;
    u64 places = (of_keys ? key_tokens : tokens) / tile_rows + sequences;
    u64 place = places * head * parts + place_of_tile(token, at.sequence, first_row, tile_rows);
    int cols = BACKWARD_COLS(head_dim), first = blockIdx.z * 4;
    u64 words = cols / 8 * WARPGROUP; // of a fragment, four floats each
    const float4* from = (const float4*)fragments
        + (of_keys ? place * 2 + half : place) * words + first * WARPGROUP + threadIdx.x;
    float4 sum[4];
#pragma unroll
    for (int n = 0; n < 4; n++) sum[n] = make_float4(0, 0, 0, 0);
    if (of_keys || turns[place] != 0)
    {
#pragma unroll 2
        for (int p = 0; p < parts; p++)
        {
#pragma unroll
            for (int n = 0; n < 4; n++)
            {
                if ((first + n) * 8 >= head_dim) continue;
                float4 x = from[n * WARPGROUP];
                sum[n].x += x.x;
                sum[n].y += x.y;
                sum[n].z += x.z;
                sum[n].w += x.w;
            }
            from += places * (tile_rows / 64) * words;
        }
    }
#pragma unroll
    for (int n = 0; n < 4; n++)
    {
        int col = (first + n) * 8 + lane % 4 * 2;
        if (col >= head_dim) continue;
#pragma unroll
        for (int i = 0; i < 2; i++)
        {
            if (row + i * 8 >= rows) continue;
            u32* word = (u32*)(
                to + ((u64)(token + row + i * 8) * to_heads + head) * head_dim + col);
            float low = scale * (i ? sum[n].z : sum[n].x);
            float high = scale * (i ? sum[n].w : sum[n].y);
            if (accumulate)
            {
                u32 before = *word;
                low += widen((real)before);
                high += widen((real)(before >> 16));
            }
            *word = narrow2(low, high);
        }
    }
}
