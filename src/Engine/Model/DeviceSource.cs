using MiniCpmNative.Engine.Config;
using MiniCpmNative.Kernels;
using MiniCpmNative.Kernels.Cpu;
using MiniCpmNative.Kernels.Cuda;

namespace MiniCpmNative.Engine.Model;

/// <summary>A device with its name in words, and what must outlive it.</summary>
public sealed record OpenDevice(Device Device, string Name, IDisposable? Owner = null) : IDisposable
{
    /// <summary>Bytes of its memory that are free, or null where the machine's is used.</summary>
    public long? FreeBytes { get; init; }

    /// <summary>Bytes of the machine's memory that are free beside a GPU's.</summary>
    public long MachineBytes { get; init; } = long.MaxValue;

    /// <summary>The card of a GPU, else null.</summary>
    public CardFigures? Card => (Device as CudaDevice)?.Card;

    /// <summary>
    /// Bytes of a GPU that a run may take: those of the limit, or what was free without what the
    /// driver and libraries take as they go.
    /// </summary>
    public long? Allowed(MemoryLimit? limit)
    {
        const long libraries = 512L << 20;
        if (Device is not CudaDevice device || FreeBytes is not { } free) return null;
        long total = device.Context.Memory().Total;
        long all = free + device.Context.HeldBytes - Math.Min(libraries, total / 16);
        return limit is null ? all : Math.Min(all, limit.Bytes(total));
    }

    /// <summary>Of streamed weights whose memory the driver did not page-lock, in words.</summary>
    public string? Pageable
    {
        get
        {
            if (Device is not CudaDevice device) return null;
            var (slow, refused) = (device.PageableBytes, device.RefusedHostBytes);
            static string Gib(long bytes) =>
                FormattableString.Invariant($"{bytes / (double)(1 << 30):0.00} GiB");
            return slow + refused == 0 ? null
                : $"{Gib(slow + refused)} of the machine's memory cannot be page-locked (ulimit "
                    + "-l, or too little is free): " + string.Join("; ", (string[])[
                    .. slow > 0 ? (string[])[$"copies of {Gib(slow)} of weights (stream_weights) "
                        + "are several times slower, and the GPU waits for them"] : [],
                    .. refused > 0 ? (string[])[$"{Gib(refused)} that were to lie there (offload, "
                        + "paged optim) stays on the GPU"] : []]);
        }
    }

    /// <summary>What is in use of a GPU, by whomever, in words behind others.</summary>
    public string InUse()
    {
        if (Device is not CudaDevice device) return "";
        try
        {
            var (free, total) = device.Context.Memory();
            return FormattableString.Invariant(
                $"; {(total - free) / (double)(1 << 30):0.00} GiB of the card are in use by all");
        }
        catch (CudaException)
        {
            // No reason to lose a result.
            return "";
        }
    }

    public void Dispose()
    {
        Device.Dispose();
        Owner?.Dispose();
    }
}

/// <summary>
/// Opens the device that a configuration asks for. The properties say where CUDA comes from; tests
/// set them.
/// </summary>
public sealed record DeviceSource
{
    // cp.async, bf16 and their matrix instructions, which kernels.cu is written with.
    private const int LeastArchitecture = 80;

    public static DeviceSource Default { get; } = new();

    /// <summary>Opens driver, NVRTC and cuBLAS.</summary>
    public Func<CudaApi> Cuda { get; init; } = () => CudaApi.Load();

    /// <summary>Where compiled kernels are kept.</summary>
    public string? Cache { get; init; } = ModuleCompiler.DefaultCache();

    /// <summary>Whether numbers come out of it, which are tried then; not where calls are only
    /// counted.</summary>
    public bool Computes { get; init; } = true;

    /// <summary>Keeps source lines in compiled kernels.</summary>
    public bool LineInfo { get; init; }

    /// <summary>Bytes of the machine's memory that are free.</summary>
    public Func<long> MachineBytes { get; init; } = MachineMemory.Free;

    /// <param name="arguments">Say device, threads and type.</param>
    /// <param name="say">Takes a line on what was chosen and why, where that is not plain.</param>
    /// <exception cref="InputException">CUDA is asked for and cannot be used.</exception>
    public OpenDevice Open(TrainArguments arguments, Action<string>? say = null)
    {
        if (arguments.Device != DeviceChoice.Cpu)
        {
            try
            {
                return OpenCuda(arguments, say);
            }
            catch (Exception problem) when (problem is CudaUnavailableException or CudaException
                or DeviceMemoryException)
            {
                string line = problem.Message.ReplaceLineEndings(" ");
                if (arguments.Device == DeviceChoice.Cuda)
                    throw new InputException($"device is cuda, which cannot be used: {line}",
                        problem);
                say?.Invoke($"{line}; computing on the CPU");
            }
        }

        if (arguments.EmbeddingsInHost || arguments.OffloadOptimizer == true)
            say?.Invoke((arguments.StreamWeights is not null and not StreamedWeights.False
                ? "stream_weights"
                : arguments.OffloadParam == true ? "offload_param" : "offload_optimizer")
                + ": on the CPU weights are in the machine's memory anyway");
        var device = new CpuDevice(arguments.Threads);
        return new OpenDevice(device, $"CPU, {Environment.ProcessorCount} processors");
    }

    /// <summary>
    /// Type in which a GPU keeps activations: BF16 for bf16, else F32. For fp16 too: small
    /// gradients of activations vanish in F16 unless the loss is scaled up, which is not done here.
    /// </summary>
    public static DType ActivationsOf(TrainArguments arguments) =>
        arguments.Bf16 ? DType.BF16 : DType.F32;

    private OpenDevice OpenCuda(TrainArguments arguments, Action<string>? say)
    {
        CudaApi api = Cuda();
        var context = new CudaContext(api);
        try
        {
            int architecture = context.Architecture;
            string capability = $"compute capability {architecture / 10}.{architecture % 10}";
            if (architecture < LeastArchitecture)
                throw new CudaUnavailableException($"cuda: {context.Name} has {capability}, "
                    + $"{LeastArchitecture / 10}.{LeastArchitecture % 10} or newer is needed");
            var device = new CudaDevice(
                context, new ModuleCompiler(api.Nvrtc, Cache), ActivationsOf(arguments),
                lineInfo: LineInfo)
            {
                Tf32 = arguments.Tf32,
            };
            if (Computes) CudaCheck.Run(device);
            if (arguments.Fp16)
                say?.Invoke(
                    "fp16: weights are float16, the GPU computes in float32; bf16 is faster and "
                    + "takes half the memory");
            var (free, total) = context.Memory();
            double gib = total / (double)(1 << 30);
            return new OpenDevice(
                device, FormattableString.Invariant($"{context.Name}, {capability}, {gib:0.0} GiB"),
                context)
            {
                FreeBytes = free,
                MachineBytes = MachineBytes(),
            };
        }
        catch
        {
            context.Dispose();
            throw;
        }
    }
}
