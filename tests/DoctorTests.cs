using MiniCpmNative.Engine.Doctor;
using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
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

    [Test]
    public void AGpuIsDescribedAndEveryKernelOfItTested()
    {
        using var gpu = new EmulatedGpu(null, CudaTools.Compiler(DeviceCompiler.Nvrtc));
        var output = new StringWriter();
        bool well = Diagnosis.Run(output, () => gpu.Api);
        string text = output.ToString();
        Assert.That(gpu.Fault, Is.Null);
        Assert.That(well, text);
        Assert.That(text, Does.Contain("compute capability 8.0"));
        Assert.That(text, Does.Contain("attention of bf16: for sm_80 and later (mma.sync)"));
        Assert.That(text, Does.Contain("self-test of the kernels for BF16"));
        Assert.That(text, Does.Contain("self-test of the kernels for F32"));
        Assert.That(text, Does.Not.Contain("not reached"));
    }

    [Test]
    public void ADeviceThatComputesWronglyIsFound()
    {
        string source = CudaKernels.Source, right = "p[j] += scale * q[j];";
        Assert.That(source.Split(right), Has.Length.EqualTo(2));
        var compiler = new ModuleCompiler(CudaTools.Compiler(DeviceCompiler.Nvrtc), cache: null);
        string wrong = source.Replace(right, "p[j] -= scale * q[j];");
        using var gpu = new EmulatedGpu(null, CudaTools.Compiler(DeviceCompiler.Nvrtc));
        using var context = new CudaContext(gpu.Api);
        CudaModule module = CudaModule.Load(
            context, compiler, wrong, "kernels.cu", new(DType.F32, context.Architecture));
        using var device = new CudaDevice(context, DType.F32, 64L << 20, new CudaKernels(module));
        using var test = new SelfTest(device);
        Assert.That(test.Run().Select(f => f.What), Has.Some.StartWith("Add { "));
    }
}
