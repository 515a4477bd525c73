using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// The rule of <see cref="CudaOpTests"/> where hardware and compilers may do otherwise: the PTX of
/// another compiler, other orders of warps, blocks and streams, and the worst of what the
/// instruction set allows (copies that arrive at once, approximate functions 2 units off, sums of
/// mma the other way round), in 16 bits with what NVRTC 13 makes for compute capability 12.0.
/// </summary>
[TestFixtureSource(nameof(Modes))]
public sealed class CudaModeTests(string mode)
{
    private const int OrderSize = 65;
    private const string FirstOrder = "seed 1";

    // Of the first mode with a seed that ran, for the others.
    private static readonly Dictionary<(string Case, DType), double[][]> s_results = [];

    private CudaUnderTest? _cuda;

    private static string[] Modes => ["clang", FirstOrder, "seed 2", "seed 3", "harsh"];

    private static IEnumerable<TestCaseData> Cases => CudaOpTests.Cases;

    [SetUp]
    public void Make()
    {
        if (CudaUnderTest.IsReal) Assert.Ignore("the modes are those of the emulated GPU");
        if (mode == "clang" && !CudaTools.HasClang) Assert.Ignore("clang is not installed");
        if (mode == "harsh" && !CommittedPtx.Blackwell.IsCurrent())
            Assert.Ignore("the committed PTX is not of kernels.cu as it is");
        if (_cuda is not { Emulator.Fault: null })
        {
            _cuda?.Dispose();
            _cuda = new(Options(mode),
                mode == "clang" ? DeviceCompiler.Clang : DeviceCompiler.Nvrtc);
        }

        _cuda.ForgetSteps();
    }

    [OneTimeTearDown]
    public void Free() => _cuda?.Dispose();

    [TestCaseSource(nameof(Cases))]
    public void AgreesInThisMode(object value, object type)
    {
        var (c, storage) = ((OpCase)value, (DType)type);
        var device = CudaOpTests.Prepare(_cuda!.Device(storage), c);
        bool isOrder = mode.StartsWith("seed", StringComparison.Ordinal);
        if (isOrder) SameBitsInEveryOrder(device, c);
        // One order's results are compared with what is right, the others' with that order's.
        if (isOrder && mode != FirstOrder) return;
        // Its approximations are wrong by two units of the last place more than a GPU's.
        bool coarse = mode == "harsh";
        if (OpReferences.Has(c)) CudaOpTests.CompareReference(device, c, storage, coarse);
        foreach (int n in c.Sizes)
            CudaOpTests.Compare(
                device, c, storage, c.Op, c.Inputs(n), null, $"{c.Name} n={n}, {mode}", coarse);
    }

    // Warps and blocks come in another order with every seed; results may not depend on it.
    private static void SameBitsInEveryOrder(CudaDevice device, OpCase c)
    {
        double[][] results = CudaOpTests.Results(device, c, OrderSize);
        if (!s_results.TryAdd((c.Name, device.Activations), results))
            Assert.That(results, Is.EqualTo(s_results[(c.Name, device.Activations)]));
    }

    private static EmulatorOptions Options(string mode) => mode switch
    {
        "clang" => new(),
        "harsh" => new()
        {
            Seed = 4,
            EarlyAsyncCopies = true,
            ApproximateUlps = 2,
            ReverseMma = true,
            Architecture = 120,
        },
        _ => new() { Seed = mode[^1] - '0' },
    };
}
