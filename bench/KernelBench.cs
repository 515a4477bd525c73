using System.Globalization;
using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cases;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Updates;

namespace MiniCpmNative.Bench;

/// <summary>
/// bench kernels [operation ...]: what each kernel of kernels.cu moves and computes, forward and
/// backward of every operation at the production shapes of <see cref="OpCases"/> in bf16, and one
/// optimizer step of 4 million parameters, counted by the emulated GPU while it runs them, and the
/// time below which no GPU of a kind can be: the longest of bytes, float and matrix work at the
/// datasheet's peaks. Where a GPU is, each launch is timed on it as well. --cold: see
/// <see cref="Real.ColdKernels"/>.
/// </summary>
internal static class KernelBench
{
    private const int Rounds = 20, Parameters = 4 << 20;

    // Peaks of the data sheets: GB/s, TFLOP/s in float outside the tensor cores, TFLOP/s of bf16
    // products without sparsity that are summed in float.
    private static readonly (string Name, double Memory, double Float, double Tensor)[] s_gpus =
    [
        ("A100 80G", 2039, 19.5, 312), ("RTX 4090", 1008, 82.6, 165), ("H100 SXM", 3350, 66.9, 989),
    ];

    // Something to run: what it needs is made once, and given back with how to run it again.
    private sealed record Subject(string Name,
        Func<CudaDevice, (Action Again, IDisposable? Owner)> Prepare);

    private static IEnumerable<Subject> Subjects =>
    [
        .. OpCases.All.Where(HasKernels)
        .Select(c => new Subject(c.Name, device => Operation(device, c))),
        new("adamw", device => Optimizer(device, DType.F32)),
        new("adamw_bf16", device => Optimizer(device, DType.BF16)),
        new("adamw_8bit", device => Optimizer(device, DType.U8)),
    ];

    private sealed record Work(int Launches, long Bytes, long Flops, long TensorFlops)
    {
        // Microseconds, and what takes them: m(emory), f(loat) or t(ensor).
        public (double Time, char Limit) Bound(double memory, double @float, double tensor) =>
            new[]
            {
                (Bytes / memory / 1e3, 'm'), (Flops / @float / 1e6, 'f'),
                (TensorFlops / tensor / 1e6, 't'),
            }.Max();
    }

    public static int Run(string[] args)
    {
        if (args is ["--cold", .. var rest]) return Real.ColdKernels.Run(rest);
        Subject[] subjects = [.. Subjects];
        if (args.Except(subjects.Select(c => c.Name)).FirstOrDefault() is { } wrong)
        {
            Console.Error.WriteLine($"bench kernels: no operation {wrong} on CUDA; there are "
                + string.Join(" ", subjects.Select(c => c.Name)));
            return 2;
        }

        if (args.Length > 0) subjects = [.. subjects.Where(c => args.Contains(c.Name))];
        CudaApi? real = Installed();
        NvrtcApi nvrtc;
        try
        {
            nvrtc = real?.Nvrtc ?? Nvrtc();
        }
        catch (CudaUnavailableException e)
        {
            Console.Error.WriteLine(e.Message);
            return 1;
        }

        Dictionary<string, Dictionary<string, double>> timed = real is null
            ? [] : Time(subjects, real);
        Dictionary<string, (string Kernel, Work Work)[]> counted = Count(subjects, nvrtc);
        Print(subjects, counted, timed);
        return 0;
    }

    private static bool HasKernels(OpCase c) =>
        c.Op.GetType().GetMethod(nameof(Op.CudaBackward))!.DeclaringType != typeof(Op);

    private static CudaApi? Installed()
    {
        try
        {
            return CudaApi.Load();
        }
        catch (CudaUnavailableException e)
        {
            Console.WriteLine($"{e.Message}; nothing is timed");
            return null;
        }
    }

    // Where no driver is, any NVRTC will do, also the one of tests/install-cuda-tools.sh.
    internal static NvrtcApi Nvrtc()
    {
        var search =
            new CudaSearch(name => Environment.GetEnvironmentVariable(name) is { Length: > 0 } set
            ? set
            : name == CudaSearch.OverrideVariable ? "/opt/cpmx-cuda/lib" : null);
        return NvrtcApi.Load(search, major: 0);
    }

    private static Dictionary<string, (string, Work)[]> Count(Subject[] subjects, NvrtcApi nvrtc)
    {
        var counted = new Dictionary<string, (string, Work)[]>();
        using var gpu = new EmulatedGpu(new() { Footprint = true }, nvrtc);
        using var context = new CudaContext(gpu.Api);
        using CudaDevice device = Device(context);
        foreach (Subject c in subjects)
        {
            gpu.ClearLaunches();
            using (c.Prepare(device).Owner) device.Stream.Synchronise();
            counted[c.Name] =
            [
                .. gpu.Launches.Where(l => !l.Kernel.StartsWith("cast_", StringComparison.Ordinal))
                    .GroupBy(l => l.Kernel).Select(g => (g.Key, new Work(g.Count(),
                        g.Sum(l => l.DramBytes), g.Sum(l => l.Flops), g.Sum(l => l.TensorFlops)))),
            ];
        }

        return counted;
    }

    // The shortest of several rounds, in microseconds by kernel.
    private static Dictionary<string, Dictionary<string, double>> Time(Subject[] subjects,
        CudaApi api)
    {
        var timed = new Dictionary<string, Dictionary<string, double>>();
        using var context = new CudaContext(api);
        using CudaDevice device = Device(context);
        foreach (Subject c in subjects)
        {
            (Action again, IDisposable? owner) = c.Prepare(device);
            using var profile = new Real.StepProfile(device, (_, _, _) => 0);
            device.Watch = profile;
            var best = new Dictionary<string, double>();
            for (int round = 0; round < Rounds; round++)
            {
                again();
                foreach (Real.KernelTime time in profile.Take())
                    best[time.Name] = Math.Min(
                        best.GetValueOrDefault(time.Name, double.MaxValue), time.Microseconds);
            }

            device.Watch = null;
            timed[c.Name] = best;
            owner?.Dispose();
        }

        Console.WriteLine(
            $"timed on {context.Name} by events around each launch, best of {Rounds} rounds");
        return timed;
    }

    private static CudaDevice Device(CudaContext context) =>
        new(context, new ModuleCompiler(context.Api.Nvrtc, cache: null), DType.BF16,
            stepBytes: 1L << 30);

    // Forward and backward have run once.
    private static (Action, IDisposable?) Operation(CudaDevice device, OpCase c)
    {
        device.Random = new(1, 1, c.Dropout);
        var run = new OpRun(device, c.ProductionOp ?? c.Op, c.Production());
        run.Forward();
        run.Want(_ => true);
        run.Backward(Fill.Normal(7, run.Count));
        return (Again, run);

        void Again()
        {
            run.ForwardAgain();
            run.BackwardAgain();
        }
    }

    // The norm of the gradient and a step with bf16 weights over float masters. All zeros: no
    // kernel's work depends on the numbers.
    private static (Action, IDisposable?) Optimizer(CudaDevice device, DType moments)
    {
        Tensor New(DType type) => device.Allocate(new(type, new Shape(Parameters)), "adamw");
        var range = OptimizerForm.Range(New(DType.BF16), New(DType.F32), New(DType.F32), 0,
            [.. new OptimizerForm(Moments: moments).StatesOf(moments, new Shape(Parameters))
                .Select(s => device.Allocate(s.Spec, s.Name))]);
        Tensor norm = device.Allocate(GradientNorm.Spec, "norm");
        Again();
        return (Again, null);

        void Again()
        {
            device.GradientNorm([range.Gradient], 1, norm, Tensor.None);
            device.Update(new UpdateStep(1e-4, 0.9, 0.999, 1e-8, 0.01, 1), range, norm);
        }
    }

    private static void Print(Subject[] subjects,
        Dictionary<string, (string Kernel, Work Work)[]> counted,
        Dictionary<string, Dictionary<string, double>> timed)
    {
        CultureInfo.CurrentCulture = CultureInfo.InvariantCulture;
        Console.WriteLine(
            "bytes (distinct 32-byte sectors) and FLOPs of forward and backward together,");
        Console.WriteLine(
            "counted by the emulated GPU; times are LOWER BOUNDS in us at datasheet peaks,");
        Console.WriteLine("not measurements: m(emory), f(loat) or t(ensor cores) is what limits");
        foreach (var gpu in s_gpus)
            Console.WriteLine($"  {gpu.Name}: {gpu.Memory} GB/s, {gpu.Float} TFLOP/s float, "
                + $"{gpu.Tensor} TFLOP/s bf16");
        Console.Write(
            $"{"operation",-20} {"kernel",-30} {"n",3} {"MB",9} {"MFLOP",9} {"tensor",9}");
        foreach (var gpu in s_gpus) Console.Write($" {gpu.Name,10}");
        Console.WriteLine(timed.Count > 0 ? $" {"measured",10}" : "");
        foreach (Subject c in subjects)
            foreach ((string kernel, Work work) in counted[c.Name])
            {
                Console.Write(
                    $"{c.Name,-20} {kernel,-30} {work.Launches,3} {work.Bytes / 1e6,9:F2} "
                    + $"{work.Flops / 1e6,9:F1} {work.TensorFlops / 1e6,9:F1}");
                foreach (var gpu in s_gpus)
                {
                    (double time, char limit) = work.Bound(gpu.Memory, gpu.Float, gpu.Tensor);
                    Console.Write($" {time,8:F2} {limit}");
                }

                Console.WriteLine(timed.TryGetValue(c.Name, out var times)
                    && times.TryGetValue(kernel, out double measured) ? $" {measured,10:F2}" : "");
            }
    }
}
