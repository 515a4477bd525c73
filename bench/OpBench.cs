using BenchmarkDotNet.Attributes;
using BenchmarkDotNet.Columns;
using BenchmarkDotNet.Configs;
using BenchmarkDotNet.Jobs;
using BenchmarkDotNet.Loggers;
using BenchmarkDotNet.Running;
using BenchmarkDotNet.Toolchains.InProcess.Emit;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cases;
using MiniCpmNative.Kernels.Cpu;

namespace MiniCpmNative.Bench;

/// <summary>
/// Forward and backward of every operation at the production shapes of <see cref="OpCases"/>,
/// float, on all cores. `bench ops [name ...]`: the operations named, or all.
/// </summary>
public class OpBench
{
    private static string[] s_names = [];
    private CpuDevice? _device;
    private OpRun? _run;

    [ParamsSource(nameof(Names))]
    public string Op { get; set; } = "";

    public static IEnumerable<string> Names => s_names;

    /// <summary>Runs the benchmarks and prints BenchmarkDotNet's table.</summary>
    public static void Run(string[] args)
    {
        string[] all = [.. OpCases.All.Select(c => c.Name)];
        foreach (string name in args.Except(all))
        {
            Console.Error.WriteLine(
                $"bench ops: no operation {name}; there are {string.Join(" ", all)}");
            return;
        }

        s_names = args.Length > 0 ? args : all;
        var job = Job.ShortRun.WithToolchain(InProcessEmitToolchain.Instance);
        var config = ManualConfig.CreateEmpty().AddJob(job).AddLogger(ConsoleLogger.Default)
            .AddColumnProvider(DefaultColumnProviders.Instance)
            .WithOptions(ConfigOptions.DisableOptimizationsValidator);
        BenchmarkRunner.Run<OpBench>(config);
    }

    [GlobalSetup]
    public void Prepare()
    {
        OpCase c = OpCases.All.Single(c => c.Name == Op);
        _device = new CpuDevice { Random = new(1, 1, c.Dropout) };
        _run = new OpRun(_device, c.ProductionOp ?? c.Op, c.Production());
        _run.Forward();
        _run.Want(_ => true);
        _run.Backward(Fill.Normal(7, _run.Count));
    }

    [Benchmark]
    public void Forward() => _run!.ForwardAgain();

    [Benchmark]
    public void Backward() => _run!.BackwardAgain();

    [GlobalCleanup]
    public void Release()
    {
        _run!.Dispose();
        _device!.Dispose();
    }
}
