using System.Diagnostics;
using System.Numerics.Tensors;
using System.Runtime.InteropServices;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Weights;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;

namespace MiniCpmNative.Engine.Model;

/// <summary>
/// Weights that a run begins by splitting, W = frozen + Scale * B A, so that the adapter starts as
/// a part of W and not as nothing: its largest singular values (PiSSA, Meng et al. 2024: A =
/// sqrt(s / Scale) Vt, B = U sqrt(s / Scale)), or its first columns (OLoRA, Büyükakyüz 2024: W = Q
/// R, B = Q's first columns, A = R's first rows). The frozen part is rounded to the run's storage
/// type, A and B stay in F32 (PEFT rounds them too). What is saved is a plain adapter on the
/// untouched W, B A - B0 A0 with twice the rank, as PEFT makes it with
/// path_initial_model_for_weight_conversion; A0 and B0 can be read back from it.
/// </summary>
public sealed unsafe class SplitWeights
{
    private readonly Dictionary<string, LowRank> _byModule = [];

    /// <summary>Splits the weights of all adapters, each on one thread.</summary>
    /// <param name="adapters">Which weights, and their ranks.</param>
    /// <param name="start">PiSSA or OLoRA.</param>
    /// <param name="weights">The model's weights.</param>
    /// <param name="storage">Type that the run stores them in.</param>
    /// <param name="seed">Of the vectors that singular vectors are sought from.</param>
    /// <param name="say">Takes lines on what goes on.</param>
    /// <exception cref="InputException">A rank is larger than a weight's.</exception>
    public static SplitWeights Of(Adapters adapters, LoraStart start, Checkpoint weights,
        DType storage, ulong seed, Action<string>? say)
    {
        foreach (Adapter adapter in adapters.List)
            if (adapter.Rank > Math.Min(adapter.Inputs, adapter.Outputs))
                throw new InputException(
                    $"init_lora_weights={start.Text}: {adapter.Module} [{adapter.Outputs}, "
                    + $"{adapter.Inputs}] has no {adapter.Rank} directions to start from: lower "
                    + "lora_r or its rank_pattern");
        say?.Invoke($"init_lora_weights={start.Text}: taking the start of "
            + $"{adapters.List.Count} adapters out of their weights, on the CPU");
        long began = Stopwatch.GetTimestamp();
        var split = new SplitWeights();
        var found = new LowRank[adapters.List.Count];
        var reading = new Lock();
        Parallel.For(0, found.Length, i =>
        {
            Adapter adapter = adapters.List[i];
            using var workers = new Workers(1);
            using var gemm = new Gemm(workers);
            DType type = default;
            void* copy = null;
            try
            {
                // A file is read by one thread at a time.
                lock (reading)
                {
                    StoredTensor stored = weights.Get(adapter.Module + ".weight");
                    using var values = new StorageValues(stored, 0, stored.Count, storage);
                    type = values.Type;
                    nuint bytes = (nuint)(stored.Count * type.Size());
                    copy = NativeMemory.AlignedAlloc(bytes, 64);
                    NativeMemory.Copy(values.Data, copy, bytes);
                }

                var w = new MatrixView(copy, type, adapter.Outputs, adapter.Inputs);
                found[i] = start.IsOlora ? Olora(adapter, w, gemm)
                    : Pissa(adapter, w, gemm, start.Iterations, seed);
            }
            finally
            {
                NativeMemory.AlignedFree(copy);
            }
        });
        for (int i = 0; i < found.Length; i++)
            split._byModule.Add(adapters.List[i].Module, found[i]);
        say?.Invoke(FormattableString.Invariant($"init_lora_weights={start.Text}: took ")
            + FormattableString.Invariant(
                $"{Stopwatch.GetElapsedTime(began).TotalSeconds:0.0} s; what is saved is a plain ")
            + "adapter of twice the rank on the untouched model");
        return split;
    }

    /// <summary>The split that a saved adapter was trained on: the second half of each
    /// rank.</summary>
    public static SplitWeights Read(
        Adapters adapters, IReadOnlyDictionary<string, StoredTensor> saved)
    {
        var split = new SplitWeights();
        foreach (Adapter adapter in adapters.List)
        {
            float[] a = saved[Adapters.NameOfA(adapter.Module)].ToFloats();
            float[] b = Columns(saved[Adapters.NameOfB(adapter.Module)].ToFloats(), adapter, 1);
            for (int i = 0; i < b.Length; i++) b[i] = -b[i];
            split._byModule.Add(
                adapter.Module, Part(adapter, a[(adapter.Rank * adapter.Inputs)..], b));
        }

        return split;
    }

    /// <summary>The trained half of a saved tensor of an adapter; others as they are.</summary>
    public static float[] Trained(Adapters adapters, string name, float[] saved)
    {
        if (adapters.Owner(name) is not { } adapter) return saved;
        return name == Adapters.NameOfA(adapter.Module)
            ? saved[..(saved.Length / 2)] : Columns(saved, adapter, 0);
    }

    /// <summary>Whether a weight is split.</summary>
    public bool Contains(string weight) => Find(weight) is not null;

    /// <summary>Scale * B A as the run began, A[rank, inputs] and B[outputs, rank].</summary>
    internal (float[] A, float[] B)? Start(string module) =>
        _byModule.TryGetValue(module, out var part) ? (part.A, part.B) : null;

    /// <summary>Makes W, in F32, what stays frozen of it.</summary>
    internal void Leave(string weight, float* values, int rows) =>
        Find(weight)!.Add(0, values, rows);

    /// <summary>What is saved of a trained A or B: [A; A0] and [B, -B0].</summary>
    internal TensorToSave ToSave(TensorToSave own, Adapter adapter, Func<float[]> values)
    {
        bool isA = own.Name == Adapters.NameOfA(adapter.Module);
        var (rows, cols) = isA ? (2 * adapter.Rank, adapter.Inputs)
            : (adapter.Outputs, 2 * adapter.Rank);
        return own with
        {
            Sizes = [rows, cols],
            Write = stream =>
            {
                LowRank start = _byModule[adapter.Module];
                float[] now = values(), before = isA ? start.A : start.B;
                int row = isA ? now.Length : adapter.Rank;
                var minus = new float[row];
                for (int i = 0; i < now.Length; i += row)
                {
                    before.AsSpan(i, row).CopyTo(minus);
                    if (!isA) TensorPrimitives.Negate<float>(minus, minus);
                    stream.Write(MemoryMarshal.AsBytes(now.AsSpan(i, row)));
                    stream.Write(MemoryMarshal.AsBytes<float>(minus));
                }
            },
        };
    }

    private LowRank? Find(string weight) => weight.EndsWith(".weight", StringComparison.Ordinal)
        ? _byModule.GetValueOrDefault(weight[..^".weight".Length]) : null;

    private static float[] Columns(float[] b, Adapter adapter, int half)
    {
        var columns = new float[adapter.Outputs * adapter.Rank];
        for (int row = 0; row < adapter.Outputs; row++)
            b.AsSpan(((2 * row) + half) * adapter.Rank, adapter.Rank)
                .CopyTo(columns.AsSpan(row * adapter.Rank));
        return columns;
    }

    private static LowRank Part(Adapter adapter, float[] a, float[] b) =>
        new(a, b, adapter.Rank, adapter.Inputs, (float)-adapter.Scale);

    private static LowRank Pissa(
        Adapter adapter, MatrixView w, Gemm gemm, int? iterations, ulong seed)
    {
        var (ut, s, vt) = TruncatedSvd.Of(
            gemm, w, adapter.Rank, iterations, seed + ((ulong)adapter.Index << 32));
        float[] a = new float[vt.Length], b = new float[ut.Length];
        for (int k = 0; k < adapter.Rank; k++)
        {
            double root = Math.Sqrt(s[k] / adapter.Scale);
            for (int i = 0; i < adapter.Inputs; i++)
                a[(k * adapter.Inputs) + i] = (float)(root * vt[(k * adapter.Inputs) + i]);
            for (int i = 0; i < adapter.Outputs; i++)
                b[(i * adapter.Rank) + k] = (float)(root * ut[(k * adapter.Outputs) + i]);
        }

        return Part(adapter, a, b);
    }

    private static LowRank Olora(Adapter adapter, MatrixView w, Gemm gemm)
    {
        var (rank, rows) = (adapter.Rank, adapter.Outputs);
        var columns = new double[rank * rows];
        var line = new float[w.Cols];
        fixed (float* to = line)
            for (int i = 0; i < rows; i++)
            {
                FloatBits.Widen((byte*)w.Data + ((long)i * w.Cols * w.Type.Size()), w.Type, to,
                    w.Cols);
                for (int k = 0; k < rank; k++) columns[(k * rows) + i] = line[k];
            }

        Factorisation.Lq(columns, rank, rows);
        float[] q = [.. columns.Select(v => (float)v)], a = new float[rank * w.Cols];
        fixed (float* from = q)
        fixed (float* to = a)
            gemm.Multiply(new MatrixView(from, DType.F32, rank, rows), w,
                new MatrixView(to, DType.F32, rank, w.Cols));
        var b = new float[rows * rank];
        for (int k = 0; k < rank; k++)
            for (int i = 0; i < rows; i++) b[(i * rank) + k] = q[(k * rows) + i];
        return Part(adapter, a, b);
    }
}
