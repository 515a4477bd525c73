using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// Would the tests notice? Small mistakes are made in the kernels themselves, one at a time, and
/// each must be found by the check that is named for it,
/// in the case that every run of the tests makes.
/// </summary>
[TestFixture]
public sealed class PlantedFaultTests
{
    private static IEnumerable<TestCaseData> Planted => Plants.All.Select((p, i) =>
        new TestCaseData(i).SetArgDisplayNames(p.Function, p.Name));

    private static IEnumerable<TestCaseData> Sound => Plants.All
        .Select((p, i) => (p, i)).DistinctBy(e => (e.p.Case, e.p.Size, e.p.Storage))
        .Select(e => new TestCaseData(e.i).SetArgDisplayNames(
            e.p.Case, $"{e.p.Size}", $"{e.p.Storage}"));

    [SetUp]
    public void OnlyEmulated()
    {
        if (CudaUnderTest.IsReal) Assert.Ignore("mistakes are planted on the emulated GPU only");
    }

    [TestCaseSource(nameof(Planted))]
    public void IsFound(int index)
    {
        Plant plant = Plants.All[index];
        switch (plant.By)
        {
            case Finder.Emulator:
                FoundByTheEmulator(plant);
                break;
            case Finder.Rule:
                Assert.That(Failure(plant), Does.Match(
                    @"\[\d+\](: .*, expected .* \+- | is .*, exactly .* are allowed)"));
                break;
            default:
                Assert.That(Failure(plant), Is.Not.Empty);
                break;
        }
    }

    // Else a finding would prove nothing.
    [TestCaseSource(nameof(Sound))]
    public void WithoutAMistakeTheCasePasses(int index)
    {
        Plant plant = Plants.All[index];
        using var cuda = new CudaUnderTest(source: plant.Sound);
        Compare(cuda, plant);
        Assert.That(cuda.Emulator!.Fault, Is.Null);
    }

    private static void FoundByTheEmulator(Plant plant)
    {
        // One thread, so that the first block with a finding is always the same.
        using var cuda =
            new CudaUnderTest(new() { Threads = 1, WarpSteps = 1 << 20 }, source: plant.Spoilt);
        Assert.Throws<CudaException>(() => Compare(cuda, plant));
        Fault fault = cuda.Emulator!.Fault!;
        TestContext.Out.WriteLine(fault);
        Assert.That(fault.Check, Is.EqualTo(plant.Check), fault.ToString());
        Assert.That(fault.Kernel, Is.EqualTo(plant.Kernel ?? plant.Function), fault.ToString());
        Assert.That(fault.Source.File, Is.EqualTo("kernels.cu"), fault.ToString());
        Assert.That(fault.Source.Line, Is.GreaterThan(0), fault.ToString());
    }

    private static string Failure(Plant plant)
    {
        using var cuda = new CudaUnderTest(source: plant.Spoilt);
        var error = Assert.Throws<AssertionException>(() => Compare(cuda, plant));
        TestContext.Out.WriteLine(error!.Message[..Math.Min(300, error.Message.Length)]);
        Assert.That(cuda.Emulator!.Fault, Is.Null);
        return error.Message;
    }

    private static void Compare(CudaUnderTest cuda, Plant plant)
    {
        if (plant.Other is { } test)
        {
            test(cuda);
            return;
        }

        OpCase c = plant.Problem;
        CudaDevice device = CudaOpTests.Prepare(cuda.Device(plant.Storage), c);
        CudaOpTests.Compare(
            device, c, plant.Storage, c.Op, c.Inputs(plant.Size), null, plant.Name);
    }
}
