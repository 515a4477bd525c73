using MiniCpmNative.Kernels;

namespace MiniCpmNative.Autograd;

/// <summary>
/// Memory for gradients of activations. They are born and die out of stack order, so they come from
/// free lists of exact sizes over the far end of the step arena; a step needs few sizes, and the
/// end of the step throws the lists away, so that changing batch shapes cannot fragment it.
/// </summary>
internal sealed class GradientPool(Device device) : ITensorPool
{
    private const long Alignment = 256;

    private (nint Data, long Bytes)[] _free = new (nint, long)[64];
    private int _freeCount;

    /// <summary>Most bytes ever in use.</summary>
    public long Peak => device.Step.FarPeak;

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

        return device.Step.PushFar(spec, "gradient");
    }

    public void Return(Tensor tensor)
    {
        if (_freeCount == _free.Length) Array.Resize(ref _free, _freeCount * 2);
        _free[_freeCount++] = (tensor.Data, Rounded(tensor.Spec));
    }

    public void Reset()
    {
        _freeCount = 0;
        device.Step.PopFar();
    }

    private static long Rounded(Spec spec) =>
        Math.Max(Alignment, (spec.Bytes + Alignment - 1) / Alignment * Alignment);
}
