using MiniCpmNative.Kernels;

namespace MiniCpmNative.Autograd;

/// <summary>
/// Memory for gradients of activations. They are born and die out of stack order, so they come from
/// free lists of exact sizes over one reserved range; a step needs few sizes, and the end of the step
/// throws the lists away, so that changing batch shapes cannot fragment it.
/// </summary>
internal sealed class GradientPool(Device device)
{
    private const long Alignment = 256;

    private readonly long _capacity = device.Step.Capacity / 2;
    private readonly nint _start = device.Reserve(device.Step.Capacity / 2);
    private (nint Data, long Bytes)[] _free = new (nint, long)[64];
    private int _freeCount;
    private long _top;

    /// <summary>Most bytes ever in use.</summary>
    public long Peak { get; private set; }

    /// <summary>A buffer of undefined content.</summary>
    public Tensor Take(Spec spec)
    {
        long bytes = Rounded(spec);
        for (int i = _freeCount - 1; i >= 0; i--)
        {
            if (_free[i].Bytes != bytes) continue;
            nint data = _free[i].Data;
            _free[i] = _free[--_freeCount];
            return new Tensor(data, spec);
        }

        if (bytes > _capacity - _top)
            throw new DeviceMemoryException(
                $"out of memory: a gradient {spec} needs {bytes:N0} bytes, "
                + $"{_capacity - _top:N0} of {_capacity:N0} are free; try gradient_checkpointing=true");
        var tensor = new Tensor(_start + (nint)_top, spec);
        _top += bytes;
        Peak = Math.Max(Peak, _top);
        return tensor;
    }

    public void Return(Tensor tensor)
    {
        if (_freeCount == _free.Length) Array.Resize(ref _free, _freeCount * 2);
        _free[_freeCount++] = (tensor.Data, Rounded(tensor.Spec));
    }

    public void Reset() => (_freeCount, _top) = (0, 0);

    private static long Rounded(Spec spec) =>
        Math.Max(Alignment, (spec.Bytes + Alignment - 1) / Alignment * Alignment);
}
