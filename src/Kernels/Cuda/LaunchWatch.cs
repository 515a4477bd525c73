namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// Sees everything that a device queues, in order: profiles put events around it, estimates add up
/// what it moves and computes. A device without one builds none of this.
/// </summary>
public interface ILaunchWatch
{
    /// <summary>The operation whose work follows.</summary>
    void Operation(Op op, in OpCall call, bool backward);

    /// <summary>Is about to be queued; <see cref="End"/> follows when it is.</summary>
    void Begin(in QueuedWork work);

    void End();
}

/// <summary>
/// A kernel, product, copy or fill. Bytes are those of its operands, each once: the least that it
/// moves. FLOPs are known for products alone (two for each multiply-add).
/// </summary>
public readonly record struct QueuedWork(string Name, long Bytes, double Flops = 0)
{
    /// <summary>Of the bytes, those that lie in host memory and come and go over the bus.</summary>
    public long HostBytes { get; init; }

    // They read some rows of a table, of which the largest argument says nothing.
    private static readonly string[] s_lookups =
        ["lookup_rows", "gather_rows", "sum_by_id", "cross_entropy_scatter"];

    /// <summary>A launch: the bytes of the tensors among its arguments.</summary>
    internal static QueuedWork Kernel(
        string name, ReadOnlySpan<KernelArgument> arguments, Func<nint, bool> isOnHost)
    {
        long bytes = 0, host = 0, largest = 0, second = 0;
        bool isLargestOnHost = false;
        foreach (ref readonly KernelArgument argument in arguments)
        {
            if (argument.Bytes == 0) continue;
            bool isHost = isOnHost((nint)argument.Bits);
            bytes += argument.Bytes;
            if (isHost) host += argument.Bytes;
            if (argument.Bytes > largest)
                (largest, second, isLargestOnHost) = (argument.Bytes, largest, isHost);
            else second = Math.Max(second, argument.Bytes);
        }

        long less = s_lookups.Contains(name) ? largest - second : 0;
        return new(name, bytes - less) { HostBytes = host - (isLargestOnHost ? less : 0) };
    }

    /// <summary>c = a b.</summary>
    internal static QueuedWork Product(CudaMatrix a, CudaMatrix b, CudaMatrix c, bool adds)
    {
        static char Form(CudaMatrix m) => m.IsTransposed ? 'T' : 'N';
        static long Bytes(CudaMatrix m) => (long)m.Rows * m.Cols * m.Data.Type.Size();
        return new(
            $"product {c.Rows} x {c.Cols} x {a.Cols} {Form(a)}{Form(b)} {a.Data.Type}"
            + (c.Data.Type == a.Data.Type ? "" : $" to {c.Data.Type}"),
            Bytes(a) + Bytes(b) + (Bytes(c) * (adds ? 2 : 1)), 2.0 * c.Rows * c.Cols * a.Cols);
    }
}
