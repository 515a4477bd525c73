using System.Runtime.InteropServices;
using System.Text;
using MiniCpmNative.GpuEmulator.Machine;
using MiniCpmNative.GpuEmulator.Ptx;

namespace MiniCpmNative.GpuEmulator.Driver;

/// <summary>Modules, functions and launches, with the limits a real device enforces at
/// launch.</summary>
internal static unsafe partial class DriverEntryPoints
{
    private const int MaxArgumentBytes = 4096;

    [UnmanagedCallersOnly]
    private static int ModuleLoadDataEx(nint* module, void* image, uint options, int* names,
        void** values)
    {
        var gpu = Gpu;
        lock (gpu.Gate)
        {
            string text = Marshal.PtrToStringUTF8((nint)image) ?? "";
            try
            {
                *module = gpu.Register(new EmulatedModule(text, gpu.Memory));
                return Results.Success;
            }
            catch (Exception e)
            {
                // As with a driver: the error says what happened, the log where and why.
                gpu.LastError = "the PTX cannot be compiled";
                WriteLog(e is PtxException ? e.Message : e.ToString(), options, names, values);
                return Results.InvalidPtx;
            }
        }
    }

    // CU_JIT_ERROR_LOG_BUFFER is 5, its size 6.
    private static void WriteLog(string message, uint options, int* names, void** values)
    {
        byte* buffer = null;
        int size = 0;
        for (uint n = 0; n < options; n++)
        {
            if (names[n] == 5) buffer = (byte*)values[n];
            if (names[n] == 6) size = (int)(nint)values[n];
        }
        if (buffer == null || size < 1) return;
        byte[] bytes = Encoding.UTF8.GetBytes(message);
        int count = Math.Min(bytes.Length, size - 1);
        bytes.AsSpan(0, count).CopyTo(new Span<byte>(buffer, size));
        buffer[count] = 0;
    }

    [UnmanagedCallersOnly]
    private static int ModuleUnload(nint handle)
    {
        var gpu = Gpu;
        lock (gpu.Gate)
        {
            if (gpu.Find<EmulatedModule>(handle) is not { } module) return Results.InvalidHandle;
            int result = Drain(gpu);
            module.Unload(gpu.Memory);
            gpu.Forget(handle);
            return result;
        }
    }

    [UnmanagedCallersOnly]
    private static int ModuleGetFunction(nint* function, nint handle, byte* name)
    {
        var gpu = Gpu;
        lock (gpu.Gate)
        {
            if (gpu.Find<EmulatedModule>(handle) is not { } module) return Results.InvalidHandle;
            string text = Marshal.PtrToStringUTF8((nint)name) ?? "";
            if (module.Find(text) is not { } program)
            {
                gpu.LastError = $"no kernel {text} in the module";
                return Results.NotFound;
            }
            *function = gpu.Register(program);
            return Results.Success;
        }
    }

    [UnmanagedCallersOnly]
    private static int FuncSetAttribute(nint function, int attribute, int value)
    {
        var gpu = Gpu;
        lock (gpu.Gate)
        {
            if (gpu.Find<Program>(function) is not { } program) return Results.InvalidHandle;
            if (attribute == 9) return Results.Success; // PREFERRED_SHARED_MEMORY_CARVEOUT: a hint
            if (attribute != 8 || value < 0 || value > OptInShared() - program.StaticShared)
                return Results.InvalidValue;
            program.MaxDynamicShared = value;
            return Results.Success;
        }
    }

    [UnmanagedCallersOnly]
    private static int FuncGetAttribute(int* value, int attribute, nint function)
    {
        var gpu = Gpu;
        lock (gpu.Gate)
        {
            if (gpu.Find<Program>(function) is not { } program) return Results.InvalidHandle;
            return attribute switch
            {
                0 => Set(value, program.MaxThreads),
                1 => Set(value, program.StaticShared),
                3 => Set(value, program.LocalBytes),
                8 => Set(value, program.MaxDynamicShared),
                _ => Results.InvalidValue,
            };
        }
    }

    /// <summary>By threads and shared memory only: the emulator has no register
    /// allocation.</summary>
    [UnmanagedCallersOnly]
    private static int OccupancyMaxActiveBlocks(int* blocks, nint function, int threads,
        nuint shared)
    {
        var gpu = Gpu;
        lock (gpu.Gate)
        {
            if (gpu.Find<Program>(function) is not { } program || threads <= 0)
                return Results.InvalidValue;
            int bytes = program.StaticShared + (int)shared + 1024;
            return Set(blocks,
                Math.Min(2048 / Math.Max(threads, 64), (OptInShared() + 1024) / bytes));
        }
    }

    [UnmanagedCallersOnly]
    private static int LaunchKernel(
        nint function, uint gridX, uint gridY, uint gridZ, uint blockX, uint blockY, uint blockZ,
            uint shared,
        nint handle, void** parameters, void** extra)
    {
        var gpu = Gpu;
        lock (gpu.Gate)
        {
            if (gpu.Fault != null) return Results.Of(gpu.Fault.Check);
            if (gpu.Find<Program>(function) is not { } program) return Results.InvalidHandle;
            if (gpu.Stream(handle) is not { } stream) return Results.InvalidHandle;
            string? refusal =
                CheckShape(program, (gridX, gridY, gridZ), (blockX, blockY, blockZ), shared);
            byte[]? arguments = null;
            refusal ??= TakeArguments(program, parameters, extra, out arguments);
            if (refusal != null)
            {
                gpu.LastError = $"{program.Kernel.Name}: {refusal}";
                return Results.InvalidValue;
            }
            var launch = new Launch(program, ((int)gridX, (int)gridY, (int)gridZ),
                ((int)blockX, (int)blockY, (int)blockZ), (int)shared, arguments!, gpu.Memory,
                    gpu.Options,
                gpu.NextLaunchSeed());
            stream.Work.Enqueue((null, () => gpu.Launch(launch)));
            return Results.Success;
        }
    }

    private static string? CheckShape(
        Program program, (uint X, uint Y, uint Z) grid, (uint X, uint Y, uint Z) block, uint shared)
    {
        ulong threads = (ulong)block.X * block.Y * block.Z;
        if (grid.X == 0 || grid.Y == 0 || grid.Z == 0) return "LaunchLimits: an empty grid";
        if (grid.X > int.MaxValue || grid.Y > 65535 || grid.Z > 65535)
            return $"LaunchLimits: grid {grid} is above (2147483647, 65535, 65535)";
        if (threads == 0 || threads > 1024 || block.X > 1024 || block.Y > 1024 || block.Z > 64)
            return $"LaunchLimits: block {block} is not of 1 to 1024 threads";
        if (threads > (ulong)program.MaxThreads)
            return $"LaunchLimits: {threads} threads, the kernel was compiled for at most {program.MaxThreads}";
        if (program.Kernel.RequiredThreads.Length > 0 && threads != (ulong)program.MaxThreads)
            return $"LaunchLimits: {threads} threads, the kernel requires {program.MaxThreads}";
        if (shared > program.MaxDynamicShared)
            return $"SharedMemoryOptIn: {shared} bytes of dynamic shared memory, {program.MaxDynamicShared} are " +
                "allowed: cuFuncSetAttribute raises that";
        if (program.StaticShared + shared > OptInShared())
            return $"LaunchLimits: {program.StaticShared + shared} bytes of shared memory are above {OptInShared()}";
        return null;
    }

    private static string? TakeArguments(Program program, void** parameters, void** extra,
        out byte[]? arguments)
    {
        int wanted = program.Kernel.ParameterBytes;
        arguments = new byte[wanted];
        if (wanted > MaxArgumentBytes)
            return $"ArgumentSize: {wanted} bytes of arguments are above 4096";
        if (extra == null)
        {
            if (parameters == null)
                return wanted == 0 ? null : "ArgumentSize: no arguments were given";
            for (int n = 0; n < program.Kernel.Parameters.Count; n++)
            {
                var p = program.Kernel.Parameters[n];
                new ReadOnlySpan<byte>(parameters[n], p.Bytes).CopyTo(arguments.AsSpan(p.Offset));
            }
            return null;
        }
        if (parameters != null) return "ArgumentSize: both ways of passing arguments were used";
        void* buffer = null;
        nuint size = 0;
        // CU_LAUNCH_PARAM_BUFFER_POINTER is 1, ..._SIZE is 2, ..._END is 0.
        for (int n = 0; extra[n] != null; n += 2)
        {
            if ((nint)extra[n] == 1) buffer = extra[n + 1];
            else if ((nint)extra[n] == 2) size = *(nuint*)extra[n + 1];
            else return $"ArgumentSize: launch option {(nint)extra[n]} is not known";
        }
        if (size != (nuint)wanted)
            return $"ArgumentSize: {size} bytes of arguments, the kernel takes {wanted}";
        new ReadOnlySpan<byte>(buffer, wanted).CopyTo(arguments);
        return null;
    }
}
