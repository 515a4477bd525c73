using System.Runtime.InteropServices;

namespace MiniCpmNative.Kernels.Cuda;

/// <content>Trained tensors of blocks, and the way of their gradients.</content>
internal sealed unsafe partial class CudaWeightStream
{
    private bool _trains;

    /// <summary>
    /// Trained tensors were changed where they are kept: blocks that have any come over anew.
    /// </summary>
    public void Forget()
    {
        if (!_trains) return;
        foreach (Half half in _halves)
        {
            if (half.Holder is { Values.Count: > 0 }) half.Holder = null;
            half.Free.Record(_device.Stream);
        }
    }

    /// <summary>What is kept of gradients is not of the step that begins.</summary>
    public void ForgetGradients()
    {
        foreach (Block block in _blocks) block.HasGradients = false;
        foreach (Half half in _halves) half.Learner = null;
    }

    /// <summary>Work that is queued from now on finds all gradients where they are kept.</summary>
    public void BringHome()
    {
        if (!_trains) return;
        foreach (Half half in _halves)
        {
            Save(half);
            _device.Stream.Wait(half.Back);
        }
    }

    // Gradients of the block are about to be written, or added to. Those of its neighbour, which
    // backward was in before, go home meanwhile.
    private void Learn(Block block)
    {
        if (block.Gradients.Count == 0) return;
        Half half = _halves[block.Number % 2], other = _halves[(block.Number + 1) % 2];
        Save(other);
        if (half.Learner == block) return;
        Save(half);
        half.Learner = block;
        if (!block.HasGradients)
        {
            _device.Stream.Wait(half.Back);
            return;
        }

        // They went home in the same buffer's order.
        _copy.Wait(half.Back);
        foreach (ref readonly Part part in CollectionsMarshal.AsSpan(block.Gradients)) Upload(part);
        half.There.Record(_copy);
    }

    private void Save(Half half)
    {
        if (half.Learner is not { } block) return;
        _back.Wait(half.Free);
        foreach (ref readonly Part part in CollectionsMarshal.AsSpan(block.Gradients))
        {
            if (part.IsOnDevice) _back.Copy((ulong)part.Host, part.Device, part.Bytes);
            else _back.Download((void*)part.Host, part.Device, part.Bytes);
            CopiedBack += part.IsOnDevice ? 0 : part.Bytes;
        }

        half.Back.Record(_back);
        (half.Learner, block.HasGradients) = (null, true);
    }
}
