using MiniCpmNative.Engine.Doctor;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

[TestFixture]
public sealed class DoctorTests
{
    [Test]
    public void TheProcessorPassesItsSelfTest()
    {
        using var device = new CpuDevice();
        using var test = new SelfTest(device);
        Assert.That(test.Run(), Is.Empty);
        Assert.That(test.Results, Is.GreaterThan(100));
    }

    [Test]
    public void WithoutAGpuItSaysWhyAndIsWell()
    {
        var output = new StringWriter();
        bool well = Diagnosis.Run(
            output, () => throw new CudaUnavailableException("cuda: nothing was found here"));
        Assert.That(well, output.ToString());
        Assert.That(output.ToString(), Does.Contain("cuda: nothing was found here"));
        Assert.That(output.ToString(), Does.Contain("device auto takes the CPU"));
    }
}
