using System.Runtime.InteropServices;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Bench;

/// <summary>
/// Times every kernel launch of a driver table by events before and after it on its stream, under
/// the kernel's name. It takes the place of two entries of the table; one table at a time.
/// </summary>
internal static unsafe class LaunchClock
{
    private static readonly Dictionary<nint, string> s_names = [];
    private static readonly List<(string Kernel, nint Start, nint End)> s_launches = [];
    private static CudaDriverApi s_driver = null!;
    private static delegate* unmanaged<nint*, nint, byte*, int> s_getFunction;
    private static delegate* unmanaged<
        nint, uint, uint, uint, uint, uint, uint, uint, nint, void**, void**, int> s_launch;

    public static void Attach(CudaDriverApi driver)
    {
        s_driver = driver;
        s_getFunction = driver.ModuleGetFunction;
        s_launch = driver.LaunchKernel;
        driver.ModuleGetFunction = &GetFunction;
        driver.LaunchKernel = &Launch;
    }

    /// <summary>Milliseconds of the launches since the last call, summed by kernel; waits for
    /// them.</summary>
    public static Dictionary<string, double> Take()
    {
        s_driver.Check(s_driver.CtxSynchronize(), "cuCtxSynchronize");
        var sums = new Dictionary<string, double>();
        foreach ((string kernel, nint start, nint end) in s_launches)
        {
            float milliseconds = 0;
            s_driver.Check(s_driver.EventElapsedTime(&milliseconds, start, end),
                "cuEventElapsedTime");
            sums[kernel] = sums.GetValueOrDefault(kernel) + milliseconds;
            s_driver.EventDestroy(start);
            s_driver.EventDestroy(end);
        }

        s_launches.Clear();
        return sums;
    }

    [UnmanagedCallersOnly]
    private static int GetFunction(nint* function, nint module, byte* name)
    {
        int result = s_getFunction(function, module, name);
        if (result == 0) s_names[*function] = Marshal.PtrToStringUTF8((nint)name) ?? "?";
        return result;
    }

    [UnmanagedCallersOnly]
    private static int Launch(nint function, uint gridX, uint gridY, uint gridZ, uint blockX,
        uint blockY, uint blockZ, uint shared, nint stream, void** arguments, void** extra)
    {
        nint start = 0, end = 0;
        if (s_driver.EventCreate(&start, 0) != 0 || s_driver.EventCreate(&end, 0) != 0)
            return s_launch(function, gridX, gridY, gridZ, blockX, blockY, blockZ, shared, stream,
                arguments, extra);
        s_driver.EventRecord(start, stream);
        int result = s_launch(function, gridX, gridY, gridZ, blockX, blockY, blockZ, shared, stream,
            arguments, extra);
        s_driver.EventRecord(end, stream);
        if (result == 0) s_launches.Add((s_names.GetValueOrDefault(function, "?"), start, end));
        return result;
    }
}
