using System.Runtime.InteropServices;
using MiniCpmNative.Cli;
using MiniCpmNative.Engine;
using MiniCpmNative.Engine.Config;
using MiniCpmNative.Engine.Model;
using MiniCpmNative.Engine.Train;
using MiniCpmNative.GpuEmulator;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cuda;
using MiniCpmNative.Kernels.Ops;
using NUnit.Framework;

namespace MiniCpmNative.Tests;

/// <summary>
/// What goes to a GPU and comes back while it computes, on the emulated one, whose streams run in
/// an order of their own wherever no event forbids it; and which device a configuration gets.
/// </summary>
[TestFixture]
public sealed class CudaTransferTests
{
    private static TrainArguments Auto { get; } = V26.Full with { Device = DeviceChoice.Auto };

    private static DeviceSource NoGpu { get; } = new()
    {
        Cuda = () => throw new CudaUnavailableException("cuda: driver not found: looked nowhere"),
    };

    /// <summary>
    /// A sum of inputs: each is filled while the ones before are still queued, and some
    /// partial sums are taken when the next one is queued. The others are not, so that nothing but
    /// the memory itself keeps an input from being overwritten.
    /// </summary>
    [TestCase(0)]
    [TestCase(1)]
    [TestCase(2)]
    [TestCase(3)]
    public void InputsAndResultsOverlapWithWork(int seed)
    {
        using var cuda = new CudaUnderTest(new EmulatorOptions { Seed = seed });
        CudaDevice device = cuda.Device(DType.F32);
        InputMemory input = device.NewInput();
        Readback results = device.NewReadback(8);
        Tensor sum = device.Allocate(new Spec(DType.F32, new Shape(2)), "sum");
        var add = new Add();
        const int Count = 100_000;
        double expected = 0;
        for (int i = 1; i <= 9; i++)
        {
            var values = new float[Count];
            Array.Fill(values, i);
            values[^1] = 2 * i;
            input.Begin((4 * values.Length) + (3 * InputMemory.Alignment));
            Tensor small = input.Push<float>(DType.F32, new Shape(2), "small", [i, 0]);
            Tensor large = input.Push<float>(DType.F32, new Shape(Count), "large", values);
            input.Send();
            // The first number comes from the small tensor, the second from the large one's end.
            Tensor end = new(large.Data + (nint)(large.Spec.Bytes - 8), sum.Spec);
            Tensor one = device.Step.Push(sum.Spec, "one"), two = device.Step.Push(sum.Spec, "two");
            device.Forward(add, new OpCall([sum, small], one, [], recorded: false));
            device.Forward(add, new OpCall([one, end], two, [], recorded: false));
            device.Copy(two, sum);
            device.Step.Pop(default);
            if (i % 4 == 0) AssertSums(results, expected);
            expected += i;
            results.Start(sum);
        }

        AssertSums(results, expected);
        Assert.That(results.IsReady, Is.True);
        Assert.That(cuda.Emulator?.Fault, Is.Null);

        static void AssertSums(Readback results, double sum) => Assert.That(
            MemoryMarshal.Cast<byte, float>(results.Wait()).ToArray(),
            Is.EqualTo([2 * sum, 2 * sum]));
    }

    [Test]
    public void AnInputThatIsLargerThanAnnouncedIsRefused()
    {
        using var cuda = new CudaUnderTest();
        InputMemory input = cuda.Device(DType.F32).NewInput();
        input.Begin(1000);
        Assert.That(
            () => input.Push<float>(DType.F32, new Shape(1 << 20), "patches", new float[1 << 20]),
            Throws.InvalidOperationException.With.Message.Contain(
                "patches F32[1048576] does not fit"));
    }

    [Test]
    public void AutoTakesTheCpuWithoutAGpuAndSaysWhy()
    {
        var said = new List<string>();
        using OpenDevice device = NoGpu.Open(Auto, said.Add);
        Assert.That(device.Name, Does.StartWith("CPU, "));
        Assert.That(said,
            Is.EqualTo(["cuda: driver not found: looked nowhere; computing on the CPU"]));
    }

    [Test]
    public void CpuAsksForNoGpu()
    {
        TrainArguments cpu = V26.Full with { Device = DeviceChoice.Cpu };
        using OpenDevice device = NoGpu.Open(cpu, line => Assert.Fail(line));
        Assert.That(device.Name, Does.StartWith("CPU, "));
    }

    [Test]
    public void CudaWithoutAGpuIsAWrongConfiguration()
    {
        TrainArguments arguments = V26.Full with { Device = DeviceChoice.Cuda };
        Assert.That(() =>
            NoGpu.Open(arguments), Throws.TypeOf<InputException>().With.Message.EqualTo(
            "device is cuda, which cannot be used: cuda: driver not found: looked nowhere"));
        var (output, error) = (new StringWriter(), new StringWriter());
        var runners = new Runners { Train = (a, log, stop) => TrainRun.Run(a, log, stop, NoGpu) };
        int code = new CommandLine(output, error, runners).Run(
            ["train", "--model_name_or_path", V26.Model, "--data_path", V26.Rows,
                "--device", "cuda", "--on_bad_row", "skip"]);
        Assert.That(code, Is.EqualTo(2));
        Assert.That(error.ToString().Trim().Split('\n'), Has.Length.EqualTo(1));
        Assert.That(error.ToString(),
            Does.StartWith("cpmx: device is cuda, which cannot be used: cuda: "));
    }

    [TestCase(false, false, DType.F32)]
    [TestCase(true, false, DType.BF16)]
    [TestCase(false, true, DType.F32)]
    public void AGpuThatIsThereIsTaken(bool bf16, bool fp16, DType activations)
    {
        using var gpu = new EmulatedGpu(
            new EmulatorOptions { Architecture = 89 }, CudaTools.Compiler(DeviceCompiler.Nvrtc));
        var source = new DeviceSource { Cuda = () => gpu.Api, Cache = CudaUnderTest.Cache };
        var said = new List<string>();
        using OpenDevice device = source.Open(Auto with { Bf16 = bf16, Fp16 = fp16 }, said.Add);
        Assert.That(device.Device.Activations, Is.EqualTo(activations));
        Assert.That(device.Name, Does.Match(@"^.+, compute capability 8\.9, 8\.0 GiB$"));
        Assert.That(said, Has.Count.EqualTo(fp16 ? 1 : 0));
    }

    [Test]
    public void AnOldGpuIsNotTaken()
    {
        using var gpu = new EmulatedGpu(
            new EmulatorOptions { Architecture = 75 }, CudaTools.Compiler(DeviceCompiler.Nvrtc));
        var said = new List<string>();
        using OpenDevice device = new DeviceSource { Cuda = () => gpu.Api }.Open(Auto, said.Add);
        Assert.That(device.Name, Does.StartWith("CPU, "));
        Assert.That(said.Single(),
            Does.Contain("has compute capability 7.5, 8.0 or newer is needed"));
    }
}
