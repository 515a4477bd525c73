using System.Diagnostics;
using System.Runtime.InteropServices;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;

namespace MiniCpmNative.Bench;

/// <summary>
/// Matrix products against OpenBLAS, which is loaded here alone: for each shape the two run in
/// turn, A B A B, in short series of calls, and the table gives the median of the ratios of
/// neighbouring series, so that a noisy machine disturbs both alike. Ratio above 1: ours is faster.
/// OpenBLAS always computes in F32 from row-major operands; rows marked bf16 or packed compare our
/// form with that.
/// </summary>
internal static unsafe class GemmBench
{
    private const int RowMajor = 101, NoTranspose = 111, Transpose = 112;
    private const double SeriesSeconds = 0.02;

    private static bool s_cpuTime;

    private static readonly Product[] s_products =
    [
        new("fwd x W^T", 512, 3584, 3584, "NT"),
        new("fwd x W^T", 512, 3584, 3584, "NT", Packed: true),
        new("fwd x W^T", 512, 3584, 3584, "NT", DType.BF16, Packed: true),
        new("fwd x W^T", 512, 3584, 3584, "NT", DType.BF16),
        new("dX dy W", 512, 3584, 3584, "NN"),
        new("dX dy W", 512, 3584, 3584, "NN", Packed: true),
        new("dX dy W", 512, 3584, 3584, "NN", DType.BF16, Packed: true),
        new("dW dy^T x", 3584, 3584, 512, "TN"),
        new("fwd x W^T", 2048, 1024, 1024, "NT"),
        new("fwd x W^T", 2048, 1024, 1024, "NT", DType.BF16, Packed: true),
        new("fwd x W^T", 512, 18944, 3584, "NT"),
        new("fwd x W^T", 512, 18944, 3584, "NT", DType.BF16, Packed: true),
        new("step q k v o", 512, 512, 512, "NT", Packed: true),
        new("step gate up", 512, 1408, 512, "NT", Packed: true),
        new("step down", 512, 512, 1408, "NT", Packed: true),
        new("step down dX", 512, 1408, 512, "NN", Packed: true),
        new("lora x A^T", 512, 16, 3584, "NT"),
        new("lora h B^T +=", 512, 3584, 16, "NT", Beta: 1),
        new("lora dh dy B", 512, 16, 3584, "NN"),
        new("lora dB dy^T h", 3584, 16, 512, "TN"),
        new("lora dA dh^T x", 16, 3584, 512, "TN"),
        new("lora dX dh A +=", 512, 3584, 16, "NN", Beta: 1),
        new("lora x A^T r64", 512, 64, 3584, "NT"),
        new("row x W^T", 1, 3584, 3584, "NT"),
        new("row x W^T", 1, 3584, 3584, "NT", DType.BF16, Packed: true),
    ];

    /// <summary>
    /// Arguments: parts of product names to run (all when none), --threads 1,2, --series N, and
    /// --cpu-time true to count processor time: for one thread it is blind to other programs' load.
    /// </summary>
    public static void Run(string[] arguments)
    {
        int[] threads = [.. Option(arguments, "--threads", "1,2").Split(',').Select(int.Parse)];
        int series = int.Parse(Option(arguments, "--series", "15"));
        s_cpuTime = bool.Parse(Option(arguments, "--cpu-time", "false"));
        string[] wanted = [.. arguments.TakeWhile(argument => !argument.StartsWith("--"))];
        var blas = OpenBlas.Load();
        Console.WriteLine(
            $"{Gemm.Best}, OpenBLAS{(blas is null ? " not found" : "")}; medians, GFLOP/s");
        Console.WriteLine(
            $"{"product",-34} {"m",6} {"n",6} {"k",6} {"threads",7} {"ours",8} {"blas",8} "
                + $"{"ratio",6}");
        foreach (var product in s_products)
        {
            if (wanted.Length > 0 && !wanted.Any(product.Title.Contains)) continue;
            foreach (int count in threads) Compare(product, count, series, blas);
        }
    }

    private static string Option(string[] arguments, string name, string standard)
    {
        int at = Array.IndexOf(arguments, name);
        return at >= 0 && at + 1 < arguments.Length ? arguments[at + 1] : standard;
    }

    private static void Compare(Product product, int threads, int series, OpenBlas? blas)
    {
        using var workers = new Workers(threads);
        using var gemm = new Gemm(workers);
        using var data = new Operands(product, workers);
        blas?.SetThreads(threads);
        void Ours() => gemm.Multiply(data.A, data.B, data.C, 1, product.Beta);
        void Theirs() => blas!.Multiply(product, data);

        double seconds = Time(Ours, 2);
        int calls = Math.Clamp((int)(SeriesSeconds / seconds), 1, 1000);
        var ours = new double[series];
        var theirs = new double[series];
        var ratios = new double[series];
        for (int i = 0; i < series; i++)
        {
            ours[i] = Time(Ours, calls);
            theirs[i] = blas is null ? double.NaN : Time(Theirs, calls);
            ratios[i] = theirs[i] / ours[i];
        }

        double flops = 2e-9 * product.M * product.N * product.K;
        Console.WriteLine(
            $"{product.Title,-34} {product.M,6} {product.N,6} {product.K,6} {threads,7} "
            + $"{flops / Median(ours),8:F1} {flops / Median(theirs),8:F1} {Median(ratios),6:F2}");
    }

    /// <summary>
    /// Seconds of a call. The first one is not counted: it wakes the threads and finds the caches
    /// full of the other library's data, and before it the other library's threads get time to fall
    /// asleep.
    /// </summary>
    private static double Time(Action call, int calls)
    {
        Thread.Sleep(20);
        call();
        var start = Clock();
        for (int i = 0; i < calls; i++) call();
        return (Clock() - start).TotalSeconds / calls;
    }

    private static TimeSpan Clock() =>
        s_cpuTime ? Environment.CpuUsage.TotalTime : Stopwatch.GetElapsedTime(0);

    private static double Median(double[] values)
    {
        Array.Sort(values);
        return values[values.Length / 2];
    }

    private sealed record Product(
        string Name, int M, int N, int K, string Form, DType Type = DType.F32, bool Packed = false,
        double Beta = 0)
    {
        public string Title =>
            $"{Name} {Form}{(Type == DType.F32 ? "" : " bf16")}{(Packed ? " packed" : "")}";
    }

    /// <summary>
    /// Random operands: A and C in F32, B row-major in F32 and in the form under test.
    /// </summary>
    private sealed class Operands : IDisposable
    {
        private readonly List<HugeMemory> _memories = [];

        public Operands(Product product, Workers workers)
        {
            var (m, n, k) = (product.M, product.N, product.K);
            bool aT = product.Form[0] == 'T', bT = product.Form[1] == 'T';
            A = Random(aT ? k : m, aT ? m : k);
            Plain = Random(bT ? n : k, bT ? k : n);
            B = Plain;
            if (product.Type == DType.BF16)
            {
                var narrow = New(DType.BF16, Plain.Rows, Plain.Cols);
                FloatBits.NarrowBF16(
                    (float*)Plain.Data, (ushort*)narrow.Data, (nint)Plain.Rows * Plain.Cols);
                B = narrow;
            }

            if (product.Packed)
            {
                long bytes = PackedMatrix.Bytes(B.Rows, B.Cols, B.Type);
                B = PackedMatrix.Pack(workers, B, Take(bytes)).View;
            }

            if (aT) A = A.T;
            if (bT) B = B.T;
            C = Random(m, n);
        }

        public MatrixView A { get; }

        public MatrixView B { get; }

        public MatrixView Plain { get; }

        public MatrixView C { get; }

        public void Dispose() => _memories.ForEach(memory => memory.Dispose());

        private byte* Take(long bytes)
        {
            var memory = new HugeMemory(bytes);
            _memories.Add(memory);
            return memory.Data;
        }

        private MatrixView New(DType type, int rows, int cols) =>
            new(Take((long)rows * cols * type.Size()), type, rows, cols);

        private MatrixView Random(int rows, int cols)
        {
            var matrix = New(DType.F32, rows, cols);
            var values = (float*)matrix.Data;
            uint state = 1;
            for (long i = 0; i < (long)rows * cols; i++)
            {
                state = (state * 1664525) + 1013904223;
                values[i] = ((int)(state >> 8) / 8388608f) - 1;
            }

            return matrix;
        }
    }

    /// <summary>
    /// Stays loaded: unloading it under its sleeping threads crashes the process.
    /// </summary>
    private sealed class OpenBlas
    {
        private static readonly string[] s_names =
        [
            "/usr/lib/x86_64-linux-gnu/openblas-openmp/libopenblas.so.0", "libopenblas.so.0",
        ];

        private readonly delegate* unmanaged<int, void> _setThreads;
        private readonly delegate* unmanaged<
            int, int, int, int, int, int, float, void*, int, void*, int, float, void*, int,
            void> _gemm;

        private OpenBlas(nint library)
        {
            _setThreads = (delegate* unmanaged<int, void>)
                NativeLibrary.GetExport(library, "openblas_set_num_threads");
            _gemm = (delegate* unmanaged<
                int, int, int, int, int, int, float, void*, int, void*, int, float, void*,
                int, void>)
                NativeLibrary.GetExport(library, "cblas_sgemm");
        }

        public static OpenBlas? Load()
        {
            foreach (string name in s_names)
                if (NativeLibrary.TryLoad(name, out nint library)) return new OpenBlas(library);
            return null;
        }

        public void SetThreads(int count) => _setThreads(count);

        public void Multiply(Product product, Operands data)
        {
            var (a, b, c) = (data.A, data.Plain, data.C);
            _gemm(
                RowMajor,
                a.IsTransposed ? Transpose : NoTranspose,
                product.Form[1] == 'T' ? Transpose : NoTranspose,
                product.M, product.N, product.K, 1, a.Data, (int)a.Stride, b.Data, (int)b.Stride,
                (float)product.Beta, c.Data, (int)c.Stride);
        }
    }
}
