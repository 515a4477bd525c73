namespace MiniCpmNative.Kernels;

/// <summary>
/// Memory for the input of one forward pass, which the host fills while the device may still
/// compute on the input before: Begin, then room for each tensor, then Send. What Begin started
/// before the last time is gone then.
/// </summary>
public abstract unsafe class InputMemory
{
    /// <summary>
    /// Starts an input of at most these bytes (each tensor's rounded up to
    /// <see cref="Alignment"/>). All operations on the input before have been called by now.
    /// </summary>
    public abstract void Begin(long bytes);

    /// <summary>Room for a tensor; host is where its elements are written before Send.</summary>
    public abstract Tensor Push(Spec spec, string name, out nint host);

    /// <summary>
    /// Brings what was written to the device, before whatever is called from now on.
    /// </summary>
    public abstract void Send();

    /// <summary>Bytes to which a tensor's size is rounded up.</summary>
    public const long Alignment = 256;

    /// <summary>A tensor with these elements, whose number is the shape's.</summary>
    public Tensor Push<T>(DType type, Shape shape, string name, ReadOnlySpan<T> values)
        where T : unmanaged
    {
        Tensor tensor = Push(new Spec(type, shape), name, out nint host);
        if ((long)values.Length * sizeof(T) != tensor.Spec.Bytes)
            throw new ShapeException(
                $"{values.Length} elements of {sizeof(T)} bytes for {tensor.Spec}");
        values.CopyTo(new Span<T>((void*)host, values.Length));
        return tensor;
    }
}
