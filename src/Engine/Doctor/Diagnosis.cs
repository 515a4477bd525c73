using System.Runtime.InteropServices;
using System.Runtime.Intrinsics;
using MiniCpmNative.Engine.Data.Images;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Engine.Doctor;

/// <summary>
/// What this machine gives cpmx: processor, picture libraries, CUDA's libraries and GPU, and
/// whether each device computes rightly. A machine without a GPU is well; a device that computes
/// wrongly, or that is there and cannot be used, is not.
/// </summary>
public static class Diagnosis
{
    /// <param name="output">One finding per line.</param>
    /// <param name="cuda">Opens the CUDA libraries; null takes those of the machine.</param>
    /// <returns>Whether every device that is there passed its self-test.</returns>
    public static bool Run(TextWriter output, Func<CudaApi>? cuda = null)
    {
        double gib = GC.GetGCMemoryInfo().TotalAvailableMemoryBytes / (double)(1 << 30);
        output.WriteLine($"system   {RuntimeInformation.OSDescription.Trim()}, "
            + $"{RuntimeInformation.ProcessArchitecture}, "
            + $"{RuntimeInformation.FrameworkDescription}");
        output.WriteLine(
            $"cpu      {Environment.ProcessorCount} processors, {Vectors()}, {gib:F1} GiB memory");
        bool well = Processor(output);
        output.WriteLine($"pictures {JpegDecoder.Describe()}");
        output.WriteLine($"pictures {WebPDecoder.Describe()}");
        output.WriteLine("pictures PNG: built in, inflated by "
            + (LibDeflate.Available ? "libdeflate" : ".NET (libdeflate would be faster)"));
        output.WriteLine("pictures GIF, BMP, TGA: built in");
        return Gpu(output, cuda ?? (() => CudaApi.Load())) && well;
    }

    private static bool Processor(TextWriter output)
    {
        using var device = new CpuDevice();
        return Test(output, "cpu     ", device, "operations");
    }

    private static bool Gpu(TextWriter output, Func<CudaApi> open)
    {
        try
        {
            CudaApi api = open();
            using var context = new CudaContext(api);
            var compiler = new ModuleCompiler(api.Nvrtc, ModuleCompiler.DefaultCache());
            var (free, total) = context.Memory();
            output.WriteLine(
                $"cuda     driver {api.Driver.Path}, CUDA {Version(context.DriverVersion)}");
            output.WriteLine($"cuda     NVRTC {compiler.Version.Major}.{compiler.Version.Minor}, "
                + api.Nvrtc.Path);
            bool well = true, first = true;
            foreach (DType storage in (DType[])[DType.BF16, DType.F32])
            {
                using var device =
                    new CudaDevice(context, compiler, storage, stepBytes: 256L << 20);
                if (first)
                {
                    output.WriteLine($"cuda     cuBLAS {device.CublasVersion}, {api.Cublas.Path}");
                    output.WriteLine($"gpu      {context.Name}, compute capability "
                        + $"{context.Architecture / 10}.{context.Architecture % 10}, "
                        + $"{context.Multiprocessors} multiprocessors, {Gib(total)} GiB memory, "
                        + $"{Gib(free)} free");
                    output.WriteLine("gpu      attention of bf16: for "
                        + CudaKernels.Generation(context, compiler));
                }

                first = false;
                well &= Test(output, "gpu     ", device, $"kernels for {storage}");
                string[] idle = [.. device.Kernels.Idle.Order()];
                if (idle.Length == 0) continue;
                output.WriteLine(
                    $"gpu      not reached by the self-test: {string.Join(", ", idle)}");
            }

            return well;
        }
        catch (CudaUnavailableException problem)
        {
            output.WriteLine(problem.Message);
            output.WriteLine("gpu      none that can be used; device auto takes the CPU");
            return true;
        }
        catch (Exception problem) when (problem is CudaException or DeviceMemoryException)
        {
            output.WriteLine($"gpu      FAILED: {problem.Message.ReplaceLineEndings(" ")}");
            return false;
        }
    }

    private static bool Test(TextWriter output, string title, Device device, string what)
    {
        using var test = new SelfTest(device);
        IReadOnlyList<SelfTestFailure> failures = test.Run();
        if (failures.Count == 0)
        {
            output.WriteLine($"{title} self-test of the {what}: {test.Results} results right");
            return true;
        }

        output.WriteLine($"{title} self-test of the {what}: "
            + $"{failures.Count} of {test.Results} results WRONG");
        foreach (SelfTestFailure failure in failures)
            output.WriteLine($"{title}   {failure.What}: error {failure.Error:G3}, "
                + $"at most {failure.Allowed:G3} allowed");
        return false;
    }

    private static string Vectors() => Vector512.IsHardwareAccelerated ? "512-bit vectors"
        : Vector256.IsHardwareAccelerated ? "256-bit vectors" : "128-bit vectors";

    private static string Version(int version) => $"{version / 1000}.{version % 1000 / 10}";

    private static string Gib(long bytes) => $"{bytes / (double)(1 << 30):F1}";
}
